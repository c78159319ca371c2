"""The worker's own output, after the supervisor that read it has died.

Standard output and error are pipes that the supervisor reads. A job may still talk to a caller when the
supervisor has been killed. Each `print` of that job would then raise BrokenPipeError, because the pipe has no
reader. So the worker holds the read ends too. A pipe that nothing reads would block the job after 64 KiB, so
the worker begins to read when the supervisor is gone. The worker throws the output away: the destination
belongs to the dead supervisor, and a write there could block in turn.

A thread reads. The loop can't: the worker's own log goes into the same pipe, and a job that prints a lot may
fill the pipe first. The loop would then wait for itself to read.

The end of the control channel alone does not say that the supervisor is gone: code of the agent may have
closed it. A supervisor that lives reads the pipes, and what the worker read would be missing from the log.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterable

from lastcall.worker.base.stopping import SHIELDED

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

    def watch(self) -> None:
        """Have a thread read the pipes empty from the end of the supervisor on, however busy the loop is."""
        if self._pipes:
            threading.Thread(target=self._take_over, name="orphan-output", daemon=True).start()

    def _take_over(self) -> None:
        # The loop's handlers are not there for the whole life of the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
        self._until_orphaned()
        # Code of the agent may have closed one, and then the number may belong to another file.
        left = {fd for fd, pipe in self._pipes.items() if pipe is not None and _identity(fd) == pipe}
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            for fd in left:
                os.set_blocking(fd, False)
            while left:
                for fd in select.select(left, [], [])[0]:
                    if not _discard(fd):
                        left.discard(fd)

    def _until_orphaned(self) -> None:
        """Wait for the end of the supervisor, and until the kernel has given its orphan another parent."""
        with contextlib.suppress(OSError):  # it has ended, or the kernel has no pidfds
            pidfd = os.pidfd_open(self._supervisor)
            try:
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                poll.poll()
            finally:
                os.close(pidfd)
        while os.getppid() == self._supervisor:
            time.sleep(LOOK_AGAIN_AFTER)


def _identity(fd: int) -> tuple[int, int] | None:
    """Return what tells an open file from every other one, or None for a closed descriptor."""
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _discard(fd: int) -> bool:
    """Read what is there; return whether more may follow."""
    try:
        return bool(os.read(fd, PIPE_BYTES))
    except BlockingIOError:
        return True
