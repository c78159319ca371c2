"""Where lastcall keeps files when no option names a place."""

from __future__ import annotations

import os
from pathlib import Path

from lastcall.supervisor.errors import UsageError


def working_directory() -> Path:
    """Return the working directory. Raises UsageError when it has been deleted."""
    try:
        return Path.cwd()
    except OSError as error:
        raise UsageError(f"the working directory is gone: {error.strerror}; change to another") from error


def runtime_directory() -> Path:
    """Return the directory of this user's control sockets.

    The directory lies in the session's runtime directory. Where XDG_RUNTIME_DIR is not set (a container, a
    cron job), the directory lies in /tmp, with the user's number in its name.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "lastcall" if base else Path(f"/tmp/lastcall-{os.getuid()}")
