"""A worker's standard output and error, read for as long as it lives and passed on as whole lines.

The reading never waits for the writing, so no worker is blocked by a pipe full of log lines.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable

# Bytes of one read: the capacity of a pipe, pipe(7).
READ_BYTES = 1 << 16
# Bytes of one line; a longer one is cut. Ours: a traceback with its locals is far below.
MAX_LINE = 1 << 20
# Lines kept for the log line of a crash. Ours: the end of a traceback.
LAST_LINES = 20
# Reads at the end of a pipe that another process still has open. Ours: 4 MB, more than pipes are enlarged to.
LAST_READS = 64


class OutputReader:
    """Reads one pipe. `write` gets whole lines, each behind the prefix; the last few are kept as they are."""

    def __init__(self, fd: int, write: Callable[[bytes], None], prefix: bytes = b"") -> None:
        self._fd: int | None = fd
        self._write = write
        self._prefix = prefix
        self._rest = bytearray()
        self.last: deque[bytes] = deque(maxlen=LAST_LINES)
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, self._read)

    def close(self) -> None:
        """Take what is there and stop reading. Its end is not waited for: a grandchild may have it open."""
        if self._fd is None:
            return
        for _ in range(LAST_READS):
            if not self._read():
                break
        if self._fd is not None:
            self._end()

    def _read(self) -> bool:
        if self._fd is None:
            return False
        try:
            chunk = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            self._end()
            return False
        self._rest += chunk
        end = self._rest.rfind(b"\n") + 1
        if end == 0 and len(self._rest) > MAX_LINE:
            self._rest += b"\n"  # a line that long is cut rather than kept
            end = len(self._rest)
        if end:
            self._pass(bytes(self._rest[:end]))
            del self._rest[:end]
        return True

    def _pass(self, lines: bytes) -> None:
        if self._prefix:
            self._write(b"".join(self._prefix + line for line in lines.splitlines(keepends=True)))
        else:
            self._write(lines)
        self.last.extend(lines.splitlines()[-LAST_LINES:])

    def _end(self) -> None:
        assert self._fd is not None
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
        self._fd = None
        if self._rest:
            self._pass(bytes(self._rest) + b"\n")
            self._rest.clear()
