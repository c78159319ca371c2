"""Close the resources of a job when it ends, in order and bounded, after all other code of the job has run.

livekit-agents runs a job's shutdown callbacks all at once, and when one raises it goes on while the others
still run. So nothing here is a callback: it runs behind them, in front of the end of the job's HTTP session
(`job_process.at_job_end`).

    1. what the agent gave to `closing`, the last first
    2. what lastcall closes itself: the call (`job.call`), then the Inworld plugin's connections
    3. the worker is told that the call is over (`base.calls_over`); only threads and exit handlers are left
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from lastcall.worker.base.clock import now
from lastcall.worker.base.resources import Closed, CloseFunction, Resources
from lastcall.worker.base.wire import Counts

log = logging.getLogger("lastcall.worker")

# Seconds for what the agent gave to `closing`, and for what lastcall closes. Together less than the 10 s that
# livekit-agents gives a job which has said that it is ending (ipc/supervised_proc.py:328-351).
JOINED_CLOSE_WITHIN = 4.0
OWN_CLOSE_WITHIN = 4.0


class Closable(Protocol):
    """Anything with an `aclose`."""

    async def aclose(self) -> Any: ...


T = TypeVar("T", bound=Closable)


class JobEnd:
    """The end of one job."""

    def __init__(self, ours: dict[str, CloseFunction], tell_over: Callable[[str], None]) -> None:
        self.tell_over = tell_over
        self._joined = Resources()
        self._ours = Resources()
        for name, close in ours.items():
            self._ours.join(name, close)

    def join(self, name: str, close: CloseFunction) -> None:
        """Have `close` run when the job ends, before what joined earlier. Raises RuntimeError if it has."""
        self._joined.join(name, close)

    async def aclose(self) -> list[Closed]:
        """Close everything, and log what had to be forced."""
        census = await self._joined.aclose(now() + JOINED_CLOSE_WITHIN)
        census += await self._ours.aclose(now() + OWN_CLOSE_WITHIN)
        for each in census:
            if each.fate != "closed":
                fields = {"resource": each.name, "fate": each.fate, "counts": each.counts}
                log.warning("a resource of the job did not close", extra=fields)
        return census


# By the JobProcess of livekit-agents, of which each job has one. A global, because an agent can reach the end
# of its job by an import only.
_ends: weakref.WeakKeyDictionary[Any, JobEnd] = weakref.WeakKeyDictionary()


def begin(
    process: Any, ours: dict[str, CloseFunction], tell_over: Callable[[str], None] = lambda _id: None
) -> None:
    """Give a job process its end, before its job runs. `tell_over` is called with the id of the job."""
    _ends[process] = JobEnd(ours, tell_over)


async def end(ctx: Any) -> None:
    """Close what the job of this JobContext holds; nothing if lastcall does not run it."""
    job_end = _ends.get(ctx.proc)
    if job_end is not None:
        await job_end.aclose()
        task = asyncio.current_task()
        # livekit-agents cancels a job when the worker is gone, or when the agent has called sys.exit().
        if task is not None and not task.cancelling():
            job_end.tell_over(ctx.job.id)


def closing(ctx: Any, closable: T) -> T:  # Any: livekit-agents' JobContext, which is not type-checked here
    """Close `closable` when the job of `ctx` ends, and return `closable`.

    `ctx` is the JobContext that the entrypoint got, `closable` anything with an async method `aclose()`.
    lastcall calls `aclose()` after the shutdown callbacks of the job, of several objects the last one first.
    All of them together have 4 seconds, then what still runs is cancelled. An `aclose()` that raises or is
    cancelled is logged. Outside lastcall, `aclose()` is a shutdown callback of the job.

    Raises RuntimeError once the job has ended and its closing has begun. Since 0.2.0.
    """

    async def close(_deadline: float) -> Counts:
        await closable.aclose()
        return {}

    async def callback() -> None:
        await closable.aclose()

    job_end = _ends.get(ctx.proc)
    if job_end is None:
        ctx.add_shutdown_callback(callback)
    else:
        job_end.join(type(closable).__name__, close)
    return closable
