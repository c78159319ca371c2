"""The user at the other end of a Unix socket."""

from __future__ import annotations

import os
import socket
import struct

# struct ucred of unix(7): pid, uid, gid.
UCRED = struct.Struct("3i")


def is_of_this_user(sock: socket.socket) -> bool:
    """Tell whether the peer runs as this user. A name in the abstract namespace has no owner."""
    _pid, uid, _gid = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return bool(uid == os.geteuid())
