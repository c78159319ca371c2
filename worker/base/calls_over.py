"""How the processes of jobs tell their worker that a call is over: one pipe for all jobs of a worker.

A call is over when the last shutdown callback and the closers have returned. Its process may live on, kept by
a thread or an exit handler. Each message is the id of a job, in one write that the kernel does not split
(PIPE_BUF), so that any number of jobs may write at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from multiprocessing.connection import Connection


class CallsOver:
    """The worker's end. `writer` is the jobs': multiprocessing hands it to each process that it starts."""

    def __init__(self) -> None:
        self._reader, self.writer = multiprocessing.Pipe(duplex=False)
        # A job does not wait for a worker that is stuck. The pipe has room for hundreds of messages.
        os.set_blocking(self.writer.fileno(), False)

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is something to take."""
        return self._reader.fileno()

    def take(self) -> list[str]:
        """Return the ids of the jobs whose calls have come to their end since the last look."""
        ids = []
        while self._reader.poll():
            ids.append(self._reader.recv_bytes().decode())
        return ids


def tell(writer: Connection, job_id: str) -> None:
    """Tell the worker that the call of a job is over; nothing happens when nobody can hear it."""
    with contextlib.suppress(OSError):
        writer.send_bytes(job_id.encode())
