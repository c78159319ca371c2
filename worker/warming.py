"""Whether a job process of this worker has been warm, and how soon the next one starts after a failure.

The first process decides about the start of the worker: a worker that registers before one is warm would be
given calls that nobody answers, while the workers that it replaces go. So registration waits for the first
warm process, and a first process that fails is a failed start.

A process that fails later ends nothing: the next one starts after a pause, and while none is warm the worker
takes no job, which another worker may have.

A process that was only too slow (`initialize_process_timeout`, 10 s) is counted and told, and no more. On a
host where everything starts at once the next one is in time. It is tried at once, as livekit-agents does by
itself, the start goes on for as long as it may take, and calls wait.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

from lastcall.worker.base.backoff import Backoff
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.wire import ProcessFailed, shortened
from lastcall.worker.sdk import agent_server, process_pool

log = logging.getLogger("lastcall.worker")

# Seconds between a process that failed and the next, the first and the longest. Ours: as `[restart] backoff`.
# A process that can't get ready costs a second of processor time, and a call may wait for the next one.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
# Seconds without a failure after which the pauses begin anew. Ours: a process that gets warm and then ends
# again and again fails as much as one that never gets warm.
FORGOTTEN_AFTER = 60.0
# Of each pause. Ours: as the restarts of workers, because workers of one machine fail together.
JITTER = 0.2


class Warming:
    """Follows the job processes of one server. `start_failed` is called when the first of them fails."""

    def __init__(
        self,
        server: Any,
        *,
        changed: Condition,
        report: Callable[[ProcessFailed], None],
        start_failed: Callable[[str], None],
    ) -> None:
        self.failures = 0
        self._server = server
        self._changed = changed
        self._report = report
        self._start_failed = start_failed
        self._is_followed = False
        self._was_warm = False
        self._is_failing = False
        self._backoff = Backoff(FIRST_PAUSE, LONGEST_PAUSE, jitter=JITTER, random=random.Random())
        self._pool: Any | None = None  # where it keeps no idle processes
        self._next_at = 0.0
        self._failed_at = 0.0
        self._is_over = False

    def begin(self) -> None:
        """Follow the processes of the server from the first one on. Called before the server runs."""
        self._is_followed = process_pool.before_first_process(self._prepare)
        process_pool.register_after(self._server, self._until_warm)

    def end(self) -> None:
        """Tell of no failure any more: the stop ends processes that are starting or idle."""
        self._is_over = True

    @property
    def was_warm(self) -> bool:
        """Whether a process has been ready for a job; true for ever after."""
        if not self._was_warm and not self._is_followed:
            self._was_warm = agent_server.has_warm_process(self._server)
        return self._was_warm

    @property
    def is_cold(self) -> bool:
        """Whether no process is ready for a job and the last that started has failed."""
        if not self._is_failing:
            return False
        if self._pool is not None:
            return not process_pool.has_idle_process(self._pool)
        return not agent_server.has_warm_process(self._server)

    def _prepare(self, pool: Any) -> None:
        process_pool.follow_processes(pool, pause=self._pause, warm=self._on_warm, failed=self._on_failed)
        if not process_pool.keeps_idle_processes(pool):
            self._pool = pool
            process_pool.start_one(pool)  # a trial: the first job gets it

    async def _until_warm(self) -> None:
        await self._changed.until(lambda: self.was_warm)

    async def _pause(self) -> None:
        await self._changed.until(lambda: now() >= self._next_at, lambda: self._next_at)

    def _on_warm(self) -> None:
        self._was_warm = True
        self._is_failing = False
        self._changed.notify()

    def _on_failed(self, reason: str, is_slow: bool) -> None:
        if self._is_over:
            return
        reason = shortened(reason)
        self.failures += 1
        if not is_slow:
            self._back_off()
            if not self._was_warm:
                self._start_failed(reason)
        if self._pool is not None and (self._was_warm or is_slow):
            process_pool.start_one(self._pool)  # the pool keeps none idle, and starts none by itself
        log.warning("job process failed", extra={"reason": reason})
        self._report(ProcessFailed(failures=self.failures, reason=reason))
        self._changed.notify()

    def _back_off(self) -> None:
        at = now()
        self._is_failing = True
        if at - self._failed_at > FORGOTTEN_AFTER:
            self._backoff.succeed()
        self._failed_at = at
        if at >= self._next_at:  # processes that started together and failed together are one failure
            self._next_at = at + self._backoff.fail()
