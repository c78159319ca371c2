"""The steps of `presence` for the jobs of one worker: which job is asked to shut down or killed, and when."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.jobs import Job, Jobs

log = logging.getLogger("lastcall.worker")


class Terminations:
    """Ends jobs that the LiveKit server has terminated, and jobs whose room is gone.

    `finish` is in seconds. `ask` is told the job and the time by which it has to have ended; `kill` kills its
    process. `is_ending` tells whether a job shuts down already. While `is_stopping`, work after a call has
    the time of the stop.
    """

    def __init__(
        self,
        jobs: Jobs,
        changed: Condition,
        *,
        finish: float,
        ask: Callable[[Job, float], Coroutine[Any, Any, None]],
        kill: Callable[[Job], None],
        is_ending: Callable[[Job], bool],
        is_stopping: Callable[[], bool],
    ) -> None:
        self._jobs = jobs
        self._changed = changed
        self._finish = finish
        self._ask = ask
        self._kill = kill
        self._is_ending = is_ending
        self._is_stopping = is_stopping

    def take(self, job_id: str) -> None:
        """Note that the server has terminated a job. An unknown one has ended."""
        for job in self._jobs:
            if job.id == job_id and job.presence.terminated_at is None:
                job.presence.terminated_at = now()
                log.debug("the LiveKit server terminates a job", extra={"job_id": job_id, "room": job.room})
        self._changed.notify()

    async def run(self) -> None:
        """Take each step when it is due. Runs for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._changed.until(self._due, self._next_at)
                for job, step in self._due():
                    if step == "ask":
                        group.create_task(self._end(job))
                    else:
                        self._end_now(job)

    def _steps(self) -> list[tuple[Job, str, float]]:
        """Return what is to be done with each job that has a process, and when."""
        steps: list[tuple[Job, str, float]] = []
        for job in self._jobs.running:
            if job.is_over or job.was_killed or job.has_exited:
                continue
            if job.was_told_to_end and job.presence.asked_at is None:
                continue
            step, at = job.presence.next_step(now(), self._finish)
            if at is not None and not (step == "kill" and self._is_stopping()):
                steps.append((job, step, at))
        return steps

    def _due(self) -> list[tuple[Job, str]]:
        return [(job, step) for job, step, at in self._steps() if at <= now()]

    def _next_at(self) -> float | None:
        return min((at for _, _, at in self._steps()), default=None)

    def _end(self, job: Job) -> Coroutine[Any, Any, None]:
        """Note that a job is asked to shut down, and return what asks it."""
        was_ending = self._is_ending(job)
        job.presence.asked_at = now()
        if job.presence.has_joined and not was_ending:
            self._jobs.cut_short(job)
            log.warning("a terminated job stays in its room and is asked to end", extra={"job_id": job.id})
        return self._ask(job, now() + self._finish)

    def _end_now(self, job: Job) -> None:
        """Kill a job that has not ended in time."""
        self._jobs.cut_short(job)
        job.was_killed = True
        log.warning(
            "work after the call took too long and is cut",
            extra={"job_id": job.id, "room": job.room, "finish": self._finish},
        )
        self._kill(job)
