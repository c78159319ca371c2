"""The entrypoint of a job in a rehearsal: a call that goes on for a time after the stop began.

The job says how it goes in datagrams to the rehearsal, and not through the log. An agent may set up the log
as it likes, and an agent that ends its process by `os._exit` would take unsent records along.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from lastcall.worker.base.clock import now
from lastcall.worker.base.settings import Rehearsal
from lastcall.worker.base.wire import (
    EntrypointBegan,
    EntrypointFailed,
    EntrypointOver,
    RehearsedJobSays,
    ShutdownAsked,
    encode,
)
from lastcall.worker.job.setup import has_handler

# Seconds. Ours: a rehearsal reads its socket several times a second. One that is gone must not hold up a job.
SEND_TIMEOUT = 1.0
# Seconds between two looks for the file that says that the stop has begun. Ours: short beside a job's time.
LOOK_EVERY = 0.05
# Characters of an exception that are told: a datagram has a bound.
MAX_ERROR_LENGTH = 2000


class RehearsedEntrypoint:
    """Run the user's entrypoint, and keep the job open until its time is over. livekit-agents pickles it.

    In a local room the user's own may fail, wait for ever, or shut the job down for want of a caller; none of
    these says anything about a stop. A shutdown by a signal handler of the agent does, so each is told.
    """

    def __init__(self, user: Callable[[Any], Awaitable[None]], rehearsal: Rehearsal) -> None:
        self.user = user
        self.rehearsal = rehearsal

    async def __call__(self, context: Any) -> None:
        job: str = context.job.id
        self._say(EntrypointBegan(job=job))

        def asked(*_: object, **__: object) -> None:
            self._say(ShutdownAsked(job=job, at=now(), has_handler=has_handler()))

        if self.rehearsal.work_seconds:
            context.add_shutdown_callback(self._work)
        shutdown, context.shutdown = context.shutdown, asked
        user = asyncio.ensure_future(self.user(context))
        over = asyncio.ensure_future(self._over())
        try:
            await asyncio.wait((user, over), return_when=asyncio.FIRST_COMPLETED)
            if user.done() and not user.cancelled() and (error := user.exception()) is not None:
                self._say(EntrypointFailed(job=job, error=repr(error)[:MAX_ERROR_LENGTH]))
            await over
        finally:
            # livekit-agents cancels and awaits an entrypoint that outlasts its job, and so does this.
            over.cancel()
            user.cancel()
            await asyncio.wait((user, over))
        self._say(EntrypointOver(job=job))
        shutdown(reason="the rehearsal is over")

    async def _over(self) -> None:
        """Return when the job's time after the begin of the stop is over.

        A time that ran from the job's own begin could be over before the last job of the scene has begun.
        """
        stop = self.rehearsal.stop
        while not os.path.exists(stop):  # noqa: ASYNC110, ASYNC240  # a stat takes microseconds
            await asyncio.sleep(LOOK_EVERY)
        await asyncio.sleep(self.rehearsal.job_seconds)

    async def _work(self) -> None:
        """Take the time of a transcript that is stored after the call."""
        await asyncio.sleep(self.rehearsal.work_seconds)

    def _say(self, message: RehearsedJobSays) -> None:
        # A new socket for each message: `asked` may run in a signal handler, between any two instructions.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sending:
            sending.settimeout(SEND_TIMEOUT)
            sending.sendto(encode(message), self.rehearsal.socket)
