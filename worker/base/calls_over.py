"""How the processes of jobs tell their worker what becomes of a call: one pipe for all jobs of a worker.

A call is over when the last shutdown callback and the closers have returned. Its process may live on, kept by
a thread or an exit handler. Before that a job tells whether it is in its room (`worker.job.room_watch`). Each
message is one write that the kernel does not split (PIPE_BUF), so that any number of jobs may write at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

What = Literal["joined", "reconnecting", "reconnected", "left", "over"]
# Bytes of a detail. Ours: with it a message stays below PIPE_BUF (4096). A longer one is not told.
MAX_DETAIL = 2048


@dataclass(frozen=True, slots=True)
class Told:
    """A message of the process of a job. `reason` is livekit's DisconnectReason, of `left`.

    `detail`: the sid and the identity of the agent in its room, with a space between them.
    """

    job_id: str
    what: str
    reason: int = 0
    detail: str = ""


class CallsOver:
    """The worker's end. `writer` is the jobs': multiprocessing hands it to each process that it starts."""

    def __init__(self) -> None:
        self._reader, self.writer = multiprocessing.Pipe(duplex=False)
        # A job does not wait for a worker that is stuck. The pipe has room for hundreds of messages.
        os.set_blocking(self.writer.fileno(), False)

    def fileno(self) -> int:
        """Return the descriptor that is readable when there is something to take."""
        return self._reader.fileno()

    def take(self) -> list[Told]:
        """Return what jobs have told since the last look."""
        told = []
        while self._reader.poll():
            head, _, detail = self._reader.recv_bytes().decode().partition("\0")
            what, reason, id = head.split(" ", 2)
            told.append(Told(id, what, int(reason), detail))
        return told


def tell(writer: Connection, job_id: str, what: What = "over", reason: int = 0, detail: str = "") -> None:
    """Tell the worker something of a job; nothing happens when nobody can hear it."""
    if len(detail.encode()) > MAX_DETAIL:
        detail = ""
    with contextlib.suppress(OSError):
        writer.send_bytes(f"{what} {reason} {job_id}\0{detail}".encode())
