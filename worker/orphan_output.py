"""The worker's own output, after the supervisor that read it has died.

Standard output and error are pipes that the supervisor reads. A job may still talk to a caller when the
supervisor has been killed. Each `print` of that job would then raise BrokenPipeError, because the pipe has no
reader. So the worker holds the read ends too. A pipe that nothing reads would block the job after 64 KiB, so
the worker begins to read when the supervisor is gone. The worker throws the output away: the destination
belongs to the dead supervisor, and a write there could block in turn.

The end of the control channel alone does not say that the supervisor is gone: code of the agent may have
closed it. A supervisor that lives reads the pipes, and what the worker read would be missing from the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterable

# As much as a pipe of Linux holds (pipe(7)).
PIPE_BYTES = 1 << 16
# Seconds between two looks for the supervisor. Ours: a `print` into a full pipe waits no longer.
LOOK_AGAIN_AFTER = 0.25
# The credentials of unix(7): pid, uid and gid.
CREDENTIALS = struct.Struct("3i")


def peer_pid(sock: socket.socket) -> int:
    """Return the pid of the process that made the socket pair, also when that process has ended since.

    The parent's pid would be that of another process if the parent had ended before it was asked for.
    """
    pid, _, _ = CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    return int(pid)


class OrphanOutput:
    """The read ends of the worker's output. `supervisor` is the pid of the parent that reads them as well."""

    def __init__(self, fds: Iterable[int], supervisor: int) -> None:
        self._supervisor = supervisor
        self._pipes = {fd: _identity(fd) for fd in fds}

    def take_over(self) -> None:
        """Read the pipes empty from the end of the supervisor on. Returns at once."""
        loop = asyncio.get_running_loop()
        if os.getppid() == self._supervisor:  # the kernel gives an orphan another parent
            loop.call_later(LOOK_AGAIN_AFTER, self.take_over)
            return
        for fd, pipe in self._pipes.items():
            # Code of the agent may have closed it, and then the number may belong to another file.
            if pipe is not None and _identity(fd) == pipe:
                with contextlib.suppress(OSError):
                    os.set_blocking(fd, False)
                    loop.add_reader(fd, _discard, fd)


def _identity(fd: int) -> tuple[int, int] | None:
    """Return what tells an open file from every other one, or None for a closed descriptor."""
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _discard(fd: int) -> None:
    try:
        ended = not os.read(fd, PIPE_BYTES)
    except BlockingIOError:
        return
    except OSError:  # closed meanwhile
        ended = True
    if ended:
        asyncio.get_running_loop().remove_reader(fd)
