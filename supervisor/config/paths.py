"""Where lastcall keeps files when no option names a place."""

from __future__ import annotations

import os
from pathlib import Path


def runtime_directory() -> Path:
    """Return the directory of this user's control sockets.

    The directory lies in the session's runtime directory. Where XDG_RUNTIME_DIR is not set (a container, a
    cron job), the directory lies in /tmp, with the user's number in its name.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "lastcall" if base else Path(f"/tmp/lastcall-{os.getuid()}")
