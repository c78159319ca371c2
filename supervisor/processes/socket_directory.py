"""The directory for the sockets of one worker, with a path that leaves room for their names."""

from __future__ import annotations

import os
import tempfile

from lastcall.supervisor.errors import SpawnError

# unix(7): sun_path holds 108 bytes, and ends with a zero.
SOCKET_PATH_BYTES = 107
# As long as multiprocessing's own `pymp-`: lastcall needs no shorter TMPDIR than `python agent.py start`.
PREFIX = "last-"
# Bytes behind the temporary directory: `tempfile` adds 8 characters to a prefix, and multiprocessing names
# the forkserver's socket `listener-` and 8 more (connection.py, `arbitrary_address`).
NEEDED_BYTES = len("/" + PREFIX) + 8 + len("/listener-") + 8
# tempfile looks at these, in this order.
VARIABLES = ("TMPDIR", "TEMP", "TMP")


def make() -> str:
    """Return a new directory. Raises SpawnError where none can be made, or its path is too long."""
    wrong = problem()
    if wrong:
        raise SpawnError(wrong)
    try:
        return tempfile.mkdtemp(prefix=PREFIX)
    except OSError as error:
        name = _variable()
        raise SpawnError(f"{name}: no directory can be made in {tempfile.gettempdir()}: {error}") from error


def problem() -> str:
    """Return why no worker can have its sockets in the temporary directory; empty when it can."""
    try:
        directory = tempfile.gettempdir()
    except OSError as error:
        return f"TMPDIR: there is no directory for temporary files: {error}"
    length, most = len(os.fsencode(directory)), SOCKET_PATH_BYTES - NEEDED_BYTES
    if length <= most:
        return ""
    return (
        f"{_variable()}: {directory} has {length} bytes, expected {most} at most, because multiprocessing"
        " makes sockets in it; give a shorter directory"
    )


def _variable() -> str:
    """Return the name of the variable that the temporary directory is from."""
    used = tempfile.gettempdir()
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    return next((name for name, path in given.items() if os.path.abspath(path) == used), "TMPDIR")
