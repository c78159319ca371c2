"""The stop of the supervisor: begun once, by the first reason, and taken to the swept end.

The deadlines are made here, once. The workers and the Inworld broker only follow them.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from lastcall.supervisor.fleet.fleet import Fleet
from lastcall.supervisor.fleet.states import STOP_LOG_EVENT, Phase
from lastcall.supervisor.fleet.stop_steps import Ending
from lastcall.supervisor.inworld_broker import Companion
from lastcall.supervisor.receipt import StopRecord
from lastcall.worker.base.budget import plan
from lastcall.worker.base.clock import now
from lastcall.worker.base.records import dataclass

# Seconds between two log lines of a drain in which nothing changes. Ours: 360 lines in an hour of grace.
REPORT_EVERY = 10.0
# Seconds that the sweep has at least, also when the deadline has passed. Ours: SIGKILL works within a few ms.
SWEEP_AT_LEAST = 0.25


@dataclass(slots=True, kw_only=True, eq=False)
class Stop(Ending):
    """The stop under way. It exists from the first signal on, so later signals find something to change.

    `started_at` is a reading of the monotonic clock. `presses` counts the Ctrl-C that were meant, duplicates
    left out; `pressed_at` is when the last one came, duplicates included.
    """

    started_at: float
    presses: int = 0
    pressed_at: float | None = None

    @property
    def grace_left(self) -> float:
        """Seconds until the stop is over at the latest."""
        return max(0.0, self.deadlines.end_at - now())


class PhaseClock:
    """The current phase, and the seconds that each took."""

    def __init__(self, record: StopRecord, log: Any) -> None:
        self.phase = Phase.STARTING
        self._since = now()
        self._record = record
        self._log = log

    def advance(self, phase: Phase, **why: Any) -> None:
        """Enter a phase; an earlier one is not gone back to."""
        if phase <= self.phase:
            return
        at = now()
        if self.phase >= Phase.FENCING:
            self._record.phases[self.phase.text] = at - self._since
        self.phase, self._since = phase, at
        if phase in STOP_LOG_EVENT:
            self._log.info(STOP_LOG_EVENT[phase], **why)


class Shutdown:
    """Begins the stop, moves its deadlines towards now, and goes through the phases until nothing is left."""

    def __init__(
        self, fleet: Fleet, companion: Companion | None, *, clock: PhaseClock, record: StopRecord, log: Any
    ) -> None:
        self.stop: Stop | None = None
        self._fleet = fleet
        self._companion = companion
        self._clock = clock
        self._record = record
        self._log = log

    @property
    def phase(self) -> Phase:
        """RUNNING once a worker works, FENCING once a stop has begun, then as far as its workers are."""
        phase = self._clock.phase
        if self.stop is not None:
            return max(phase, Phase.FENCING)
        return Phase.RUNNING if phase is Phase.STARTING and self._fleet.works else phase

    def begin(self, reason: str, at: float | None = None) -> Stop:
        """Begin the stop and fence every worker at once; return the stop under way if there is one already.

        `at` is when the reason came up, by the monotonic clock; now, if not given.
        """
        if self.stop is None:
            started_at = now() if at is None else at
            self._fleet.fence(reason)  # before anything else: an offer may be on its way
            config = self._fleet.config
            deadlines = plan(started_at, config.grace, config.shares)
            self.stop = Stop(reason=reason, deadlines=deadlines, started_at=started_at)
            self._fleet.begin_stop(self.stop)
            self._record.begin(reason, started_at, deadlines)
            if self._companion is not None:
                self._companion.wake()
        return self.stop

    def hurry(self, stop: Stop) -> None:
        """End the drain now; jobs that still run are asked to shut down."""
        at = now()
        self._record.ask("hurry", at)
        stop.deadlines = stop.deadlines.hurried(at)
        self._fleet.wake()

    def kill(self, stop: Stop) -> None:
        """Wait for nothing any more."""
        at = now()
        self._record.ask("kill", at)
        stop.deadlines = stop.deadlines.killed(at)
        self._fleet.wake()

    async def run(self, stop: Stop, supervisor_id: str, *, inherits_orphans: bool) -> None:
        """End the workers, then the broker, and sweep, until nothing is left or the deadline is over."""
        fleet, clock = self._fleet, self._clock
        jobs = len(fleet.ledger.running)
        clock.advance(Phase.FENCING, reason=stop.reason, jobs=jobs, grace_s=round(stop.grace_left, 1))
        async with asyncio.TaskGroup() as group:
            reporting = group.create_task(self._guarded_report(stop))
            async with asyncio.TaskGroup() as stops:
                for slot in fleet.slots:
                    stops.create_task(slot.stop(stop))
            # A slot's own task cleans up behind its worker; it ends by itself once that is done.
            await fleet.changed.until(
                lambda: not any(slot.is_alive for slot in fleet.slots), lambda: stop.deadlines.end_at
            )
            reporting.cancel()
        if self._companion is not None:
            await self._companion.stop(lambda: stop.deadlines)
        clock.advance(Phase.SWEEPING)
        at_least = now() + SWEEP_AT_LEAST
        await fleet.sweep(
            supervisor_id,
            lambda: max(stop.deadlines.end_at, at_least),
            inherits_orphans=inherits_orphans,
        )

    async def _guarded_report(self, stop: Stop) -> None:
        """Keep a fault in the report from cancelling the stops of the workers."""
        try:
            await self._report(stop)
        except Exception as error:
            self._fleet.on_fault("report", error)

    async def _report(self, stop: Stop) -> None:
        """Follow the phase, and say every few seconds how much is left."""
        fleet, clock = self._fleet, self._clock
        said_at = now()
        while True:
            if fleet.phase < Phase.SWEEPING:
                clock.advance(fleet.phase, jobs=len(fleet.ledger.running))
            due = said_at + REPORT_EVERY
            changed = await fleet.changed.until(
                lambda: clock.phase < fleet.phase < Phase.SWEEPING, functools.partial(float, due)
            )
            if not changed:
                said_at = now()
                jobs, left = len(fleet.ledger.running), round(stop.grace_left)
                self._log.info("waiting for jobs", phase=clock.phase.text, jobs=jobs, seconds_left=left)
