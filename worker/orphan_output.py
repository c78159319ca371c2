"""The worker's own output, after the supervisor that read it has died.

Standard output and error are pipes that the supervisor reads. A job may still talk to a caller when the
supervisor has been killed. Each `print` of that job would then raise BrokenPipeError, because the pipe has no
reader. So the worker holds the read ends too. A pipe that nothing reads would block the job after 64 KiB, so
the worker begins to read when the supervisor is gone. The worker throws the output away: the destination
belongs to the dead supervisor, and a write there could block in turn.
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
