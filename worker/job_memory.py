"""The memory of jobs and of the programs that they start.

A job may have a limit (`[jobs] memory_mb`). The job is asked to shut down at ASK_AT of the limit, so that its
shutdown callbacks can run. The job is killed at the limit, or ENDS_WITHIN after it was asked, and the
programs below the job are killed too. No other job is concerned.

When there is no memory left at all, the kernel kills the process that holds most of it. That may be a
job that does not grow, or a forkserver, whose end takes its jobs along. So jobs raise their `oom_score_adj`
(`worker.job.setup`), and this module raises that of the programs of jobs by PROGRAMS_DIE_BEFORE.

The look runs in a thread: it takes the kernel milliseconds to count the pages of a large process. A look may
fail, as without a free descriptor or with no memory left. Then the next look does the work. The kill at the
deadline does not depend on looks.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from lastcall.worker.base.budget import ENTRYPOINT_WAIT
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.memory import (
    Process,
    die_before,
    held_alone,
    held_at_most,
    kill_if_same,
    oom_adjustment,
    processes_below,
)
from lastcall.worker.jobs import EXIT_WITHIN, Job, Jobs

log = logging.getLogger("lastcall.worker")

# Steps of oom_score_adj above that of the worker, in thousandths of the memory. Ours: the smallest steps that
# leave no doubt, because each step also moves jobs in front of other programs of the machine.
PROGRAMS_DIE_BEFORE = 100
# Share of the limit. Ours: the rest is for the shutdown callbacks.
ASK_AT = 0.8
# Seconds that a job has to end once it was asked. livekit-agents waits for the entrypoint and then runs the
# callbacks, for which a job has as long as livekit-agents gives by default. A stop gives the callbacks less
# (CALLBACKS in base/budget.py), because there the seconds are taken from other calls.
ENDS_WITHIN = ENTRYPOINT_WAIT + EXIT_WITHIN
# Seconds between two looks. Ours: short for a job that leaks. A job that fills memory as fast as the
# processor can, about 1 GB/s, comes to the kernel's limit first.
LOOK_EVERY = 0.5
# The same once a job holds half of its limit.
LOOK_OFTEN = 0.1
# The same after a look that has failed. Ours: a lack may last, and looks that fail cost something too.
LOOK_AGAIN = 1.0
# The same without a limit: only for the order in which the kernel would kill.
LOOK_SELDOM = 2.0
MEGABYTE = 1 << 20

Ask = Callable[[Job, float], Coroutine[Any, Any, None]]
T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Holding:
    """The processes below one job, and the memory of the job with theirs."""

    below: list[Process]
    bytes: int = 0


class MemoryWatch:
    """Watches the running jobs of one worker. `limit` is in bytes, 0 for none.

    `ask` is told the job and the time by which the job has to have ended; `kill` kills a job's process.
    `is_ending` tells whether a job shuts down already.
    """

    def __init__(
        self,
        jobs: Jobs,
        changed: Condition,
        *,
        limit: int,
        ask: Ask,
        kill: Callable[[Job], None],
        is_ending: Callable[[Job], bool],
    ) -> None:
        self._jobs = jobs
        self._changed = changed
        self._limit = limit
        self._ask = ask
        self._kill = kill
        self._is_ending = is_ending
        self._base = oom_adjustment()
        self._placed: set[Process] = set()
        # The jobs that were asked or killed, with the last that was seen of them.
        self._over: dict[Job, Holding] = {}
        # One thread, kept: later looks need no new one.
        self._thread = ThreadPoolExecutor(1, "job-memory")
        self._told: set[tuple[type[Exception], int | None]] = set()

    async def run(self) -> None:
        """Watch for ever. A look that fails concerns no job, and another follows."""
        try:
            async with asyncio.TaskGroup() as ending:
                while True:
                    await self._changed.until(lambda: self._watched() or self._over)
                    try:
                        pause = await self._look(ending)
                    except Exception as error:
                        self._note(error)
                        pause = LOOK_AGAIN
                    await asyncio.sleep(pause)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _watched(self) -> list[Job]:
        """Return the running jobs that have a process, and not only a thread of the worker."""
        return [job for job in self._jobs.running if job.pid != os.getpid()]

    async def _look(self, ending: asyncio.TaskGroup) -> float:
        """Look once, and return the seconds until the next look."""
        for job in [job for job in self._over if job.has_exited]:
            # The memory may be that of what the job has left behind.
            await self._in_thread(_kill_programs, self._over[job].below)
            del self._over[job]
        jobs = self._watched()
        seen = await self._in_thread(self._see, [job.pid for job in jobs if job.pid is not None])
        for job in jobs:
            holding = None if job.pid is None else seen.get(job.pid)
            if holding is not None and not job.has_ended:
                self._judge(job, holding, ending)
        if not self._limit:
            return LOOK_SELDOM
        most = max((holding.bytes for holding in seen.values()), default=0)
        return LOOK_OFTEN if self._over or most > self._limit / 2 else LOOK_EVERY

    def _judge(self, job: Job, holding: Holding, ending: asyncio.TaskGroup) -> None:
        is_full = 0 < self._limit <= holding.bytes
        if job in self._over:
            self._over[job] = holding
        elif 0 < self._limit * ASK_AT <= holding.bytes and not self._is_ending(job):
            due_at = now() + ENDS_WITHIN
            ending.create_task(self._kill_at(job, due_at))
            self._over[job] = holding
            job.over_memory = True
            self._log("job is asked to end for its memory", job, holding)
            if not is_full:
                ending.create_task(self._ask_once(job, due_at))
        if is_full and not job.was_killed:
            self._over[job] = holding
            self._kill_now(job)

    async def _ask_once(self, job: Job, due_at: float) -> None:
        try:
            await self._ask(job, due_at)
        except Exception as error:
            self._note(error)

    async def _kill_at(self, job: Job, due_at: float) -> None:
        """Kill the job at its deadline if it still runs then."""
        await asyncio.sleep(max(0.0, due_at - now()))
        while job in self._over and not job.was_killed:
            try:
                if job.has_exited:
                    return
                self._kill_now(job)
            except Exception as error:
                self._note(error)
                await asyncio.sleep(LOOK_AGAIN)

    def _kill_now(self, job: Job) -> None:
        self._kill(job)
        job.was_killed = True
        self._log("job is killed for its memory", job, self._over[job])

    def _log(self, event: str, job: Job, holding: Holding) -> None:
        figures = {"memory_mb": holding.bytes // MEGABYTE, "limit_mb": self._limit // MEGABYTE}
        log.warning(event, extra={"job_id": job.id, "room": job.room, **figures})

    def _note(self, error: Exception) -> None:
        """Log the first error of each kind: a lack may last, and each look would find it again."""
        kind = type(error), getattr(error, "errno", None)
        if kind not in self._told:
            self._told.add(kind)
            log.error("a look at the memory of jobs failed", exc_info=error)

    # -- in a thread ------------------------------------------------------------------------------------

    async def _in_thread(self, function: Callable[[list[Any]], T], argument: list[Any]) -> T:
        loop = asyncio.get_running_loop()
        try:
            result = loop.run_in_executor(self._thread, function, argument)
        except RuntimeError:
            # The thread could not be started, and the executor keeps what nobody waits for.
            self._thread = ThreadPoolExecutor(1, "job-memory")
            raise
        return await result

    def _see(self, pids: list[int]) -> dict[int, Holding]:
        """Return what each of the jobs' processes holds with all that is below it, and place those."""
        seen = {pid: Holding(below=programs) for pid, programs in processes_below(pids).items()}
        programs = {program for holding in seen.values() for program in holding.below}
        for program in programs - self._placed:
            die_before(self._base + PROGRAMS_DIE_BEFORE, program.pid)
        self._placed = programs
        if self._limit:
            for pid, holding in seen.items():
                family = [pid, *(program.pid for program in holding.below)]
                holding.bytes = sum(map(held_at_most, family))
                if holding.bytes >= self._limit / 2:
                    holding.bytes = sum(map(held_alone, family))
        return seen


def _kill_programs(programs: list[Process]) -> None:
    for program in programs:
        kill_if_same(program)
