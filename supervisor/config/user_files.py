"""Reads a file that the user names: whole, once, within a bound, whatever kind of file it is.

A secret manager mounts an env file as a named pipe, a shell gives `<(…)` as `/dev/fd/63`, and a mount of
`/dev/null` hides a file. All of them are read like a regular file. Every error is an `Unreadable`, whose text
follows the name of the file.
"""

from __future__ import annotations

import io
import os
import select
import stat
import time
from pathlib import Path

from lastcall.supervisor.errors import Unreadable

# Seconds from the opening to the end of the file. Ours: a program that fetches a secret answers within that.
READ_WITHIN = 5.0
# Bytes. Ours: far above any configuration, and a bound on /dev/zero.
MAX_BYTES = 16 << 20
CHUNK_BYTES = 64 * 1024


def read_text(path: str | Path, *, again: bool = False) -> str:
    """Return the text of a file, as UTF-8 without a byte order mark. Blocks for up to `READ_WITHIN` seconds.

    `again` says that the file has been read before: a pipe that has nothing more to give is an error then,
    and no empty file. Raises Unreadable.
    """
    try:
        data = _read(path, again)
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()
    except IsADirectoryError:
        raise Unreadable("is a directory") from None
    except FileNotFoundError:
        if os.path.islink(path):
            raise Unreadable("is a link to a file that is not there") from None
        raise Unreadable("can't be read: there is no such file", is_absent=True) from None
    except UnicodeDecodeError as error:
        raise Unreadable(f"can't be read: not UTF-8 at byte {error.start}") from None
    except (OSError, ValueError) as error:
        raise Unreadable(f"can't be read: {words_of(error)}") from None


def words_of(error: Exception) -> str:
    """Return the system's words for an error of a path or a name, without the path and the number."""
    return str((isinstance(error, OSError) and error.strerror) or error or type(error).__name__)


def _read(path: str | Path, again: bool) -> bytes:
    # Non-blocking: opening a named pipe would wait for ever for a process that writes into it.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        is_pipe = stat.S_ISFIFO(os.fstat(fd).st_mode)
        if again and is_pipe and _has_no_name(fd):
            raise Unreadable("can't be read again: it is a pipe that has been read to its end")
        data = _read_to_the_end(fd)
    finally:
        os.close(fd)
    if again and is_pipe and not data:
        raise Unreadable("can't be read again: it is a pipe that gave nothing this time")
    return data


def _read_to_the_end(fd: int) -> bytes:
    deadline = time.monotonic() + READ_WITHIN
    poll = select.poll()
    # A pipe that no process has opened for writing yet is neither readable nor hung up, so poll() waits.
    poll.register(fd, select.POLLIN)
    data = bytearray()
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise Unreadable(f"can't be read: it has not come to an end within {READ_WITHIN:g} s")
        try:
            chunk = os.read(fd, CHUNK_BYTES)
        except BlockingIOError:
            continue
        if not chunk:
            return bytes(data)
        data += chunk
        if len(data) > MAX_BYTES:
            raise Unreadable(f"can't be read: it has more than {MAX_BYTES >> 20} MB")


def _has_no_name(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")
    except OSError:
        return False
