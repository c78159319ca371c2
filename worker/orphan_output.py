"""The worker's own output, after the supervisor that read it has died.

Standard output and error are pipes that the supervisor reads. When it is killed, a pipe without a reader
would raise BrokenPipeError into every `print` of a job that is still talking to a caller, and one with a
reader that never reads would block it after 64 KiB. So the worker holds the read ends too, unread, and
takes over the reading when the supervisor is gone. The worker throws the output away: its destination belongs
to the dead supervisor, and a write there could block in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable

# As much as a pipe of Linux holds (pipe(7)).
PIPE_BYTES = 1 << 16


def drain_forever(fds: Iterable[int]) -> None:
    """Read the descriptors empty whenever there is something, until the process ends."""
    loop = asyncio.get_running_loop()
    for fd in fds:
        os.set_blocking(fd, False)
        loop.add_reader(fd, _discard, fd)


def _discard(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.read(fd, PIPE_BYTES)
