"""The memory of jobs and of the programs that they start.

A job may have a limit (`[jobs] memory_mb`). The job is asked to shut down at ASK_AT of the limit, so that its
shutdown callbacks can run. The job is killed at the limit, or ENDS_WITHIN after it was asked, and the
programs below the job are killed too. No other job is concerned.

When there is no memory left at all, the kernel kills the process that holds most of it. That may be a
job that does not grow, or a forkserver, whose end takes its jobs along. So jobs raise their `oom_score_adj`
(`worker.job.setup`), and this module raises that of the programs of jobs by PROGRAMS_DIE_BEFORE.

The look runs in a thread: it takes the kernel milliseconds to count the pages of a large process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from lastcall.worker.base.budget import ENTRYPOINT_WAIT
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.memory import (
    Process,
    all_processes,
    below,
    die_before,
    held_alone,
    held_at_most,
    oom_adjustment,
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
# The same without a limit: only for the order in which the kernel would kill.
LOOK_SELDOM = 2.0
MEGABYTE = 1 << 20

Ask = Callable[[Job, float], Coroutine[Any, Any, None]]


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
        # The jobs that are over the limit, with their deadline and what was last seen below them.
        self._over: dict[Job, tuple[float, list[Process]]] = {}

    async def run(self) -> None:
        """Watch for ever. A fault in here is logged, ends the watch, and concerns no job."""
        try:
            async with asyncio.TaskGroup() as asking:
                while True:
                    await self._changed.until(lambda: self._watched() or self._over)
                    await asyncio.sleep(await self._look(asking))
        except* Exception as error:
            log.error("memory of jobs is no longer watched", exc_info=error)

    def _watched(self) -> list[Job]:
        """Return the running jobs that have a process, and not only a thread of the worker."""
        return [job for job in self._jobs.running if job.pid != os.getpid()]

    async def _look(self, asking: asyncio.TaskGroup) -> float:
        """Look once, and return the seconds until the next look."""
        jobs = self._watched()
        seen = await asyncio.to_thread(self._see, [job.pid for job in jobs if job.pid is not None])
        for job in jobs:
            holding = None if job.pid is None else seen.get(job.pid)
            if holding is not None and not job.has_ended:
                self._judge(job, holding, asking)
        for job in [job for job in self._over if job.has_exited]:
            _, programs = self._over.pop(job)
            self._kill_programs(programs)
        if not self._limit:
            return LOOK_SELDOM
        most = max((holding.bytes for holding in seen.values()), default=0)
        return LOOK_OFTEN if self._over or most > self._limit / 2 else LOOK_EVERY

    def _judge(self, job: Job, holding: Holding, asking: asyncio.TaskGroup) -> None:
        is_full = 0 < self._limit <= holding.bytes
        due_at = math.inf
        if job in self._over:
            due_at, _ = self._over[job]
            self._over[job] = due_at, holding.below
        elif 0 < self._limit * ASK_AT <= holding.bytes and not self._is_ending(job):
            due_at = now() + ENDS_WITHIN
            self._over[job] = due_at, holding.below
            job.over_memory = True
            self._log("job is asked to end for its memory", job, holding)
            if not is_full:
                asking.create_task(self._ask(job, due_at))
        if (is_full or now() > due_at) and not job.was_killed:
            self._over[job] = due_at, holding.below
            job.was_killed = True
            self._log("job is killed for its memory", job, holding)
            self._kill(job)

    def _log(self, event: str, job: Job, holding: Holding) -> None:
        figures = {"memory_mb": holding.bytes // MEGABYTE, "limit_mb": self._limit // MEGABYTE}
        log.warning(event, extra={"job_id": job.id, "room": job.room, **figures})

    # -- in a thread ------------------------------------------------------------------------------------

    def _see(self, pids: list[int]) -> dict[int, Holding]:
        """Return what each of the jobs' processes holds with all that is below it, and place those."""
        processes = all_processes()
        seen = {pid: Holding(below=programs) for pid, programs in below(pids, processes).items()}
        for holding in seen.values():
            for program in set(holding.below) - self._placed:
                die_before(self._base + PROGRAMS_DIE_BEFORE, program.pid)
                self._placed.add(program)
        self._placed &= set(processes.values())
        if self._limit:
            for pid, holding in seen.items():
                family = [pid, *(program.pid for program in holding.below)]
                holding.bytes = sum(map(held_at_most, family))
                if holding.bytes >= self._limit / 2:
                    holding.bytes = sum(map(held_alone, family))
        return seen

    def _kill_programs(self, programs: list[Process]) -> None:
        """Kill what a job over the limit has left behind: the memory may be theirs."""
        living = all_processes()
        for program in programs:
            same = living.get(program.pid)
            if same is not None and same.started == program.started:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(program.pid, signal.SIGKILL)
