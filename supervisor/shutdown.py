"""One stop, from its reason to the swept end. The deadlines are made here, once; slots only follow them."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from lastcall.supervisor.fleet.fleet import Fleet
from lastcall.supervisor.fleet.states import Phase
from lastcall.supervisor.inworld_broker import Companion
from lastcall.supervisor.receipt import StopRecord
from lastcall.worker.base.budget import Deadlines, Shares, plan
from lastcall.worker.base.clock import now

REPORT = 10.0


class Countdown:
    """The deadlines of the stop under way. They move only towards now, and whoever waits is woken."""

    def __init__(self, fleet: Fleet, *, started_at: float, grace: float, shares: Shares, reason: str) -> None:
        self.reason = reason
        self.started_at = started_at
        self.deadlines: Deadlines = plan(started_at, grace, shares)
        self._fleet = fleet

    @property
    def grace_left(self) -> float:
        return max(0.0, self.deadlines.end_at - now())

    def hurry(self) -> None:
        """End the drain now; jobs that still run are asked to shut down."""
        self.deadlines = self.deadlines.hurried(now())
        self._wake()

    def kill(self) -> None:
        """Wait for nothing any more."""
        self.deadlines = self.deadlines.killed(now())
        self._wake()

    def _wake(self) -> None:
        for slot in self._fleet.slots:
            slot.changed.notify()
        self._fleet.changed.notify()


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
        if phase >= Phase.FENCING:
            self._log.info("stop " + phase.text, **why)


async def shut_down(
    fleet: Fleet,
    countdown: Countdown,
    clock: PhaseClock,
    log: Any,
    supervisor_id: str,
    *,
    inherits_orphans: bool,
    companion: Companion | None = None,
) -> None:
    """Stop every slot, then the companion, and sweep, until nothing is left or the deadline has passed."""
    fleet.begin_stop()
    fleet.ledger.begin_stop()
    jobs = len(fleet.ledger.running)
    clock.advance(Phase.FENCING, reason=countdown.reason, jobs=jobs, grace_s=round(countdown.grace_left, 1))
    async with asyncio.TaskGroup() as group:
        reporting = group.create_task(_report(fleet, countdown, clock, log))
        async with asyncio.TaskGroup() as stops:
            for slot in fleet.slots:
                stops.create_task(slot.stop(countdown))
        # A slot's own task cleans up behind its worker; it ends by itself once that is done.
        await fleet.changed.until(
            lambda: not any(slot.is_alive for slot in fleet.slots),
            lambda: countdown.deadlines.end_at,
        )
        reporting.cancel()
    if companion is not None:
        await companion.stop(lambda: countdown.deadlines)
    clock.advance(Phase.SWEEPING)
    due = max(countdown.deadlines.end_at, now() + 0.25)
    await fleet.sweep(supervisor_id, due, inherits_orphans=inherits_orphans)


async def _report(fleet: Fleet, countdown: Countdown, clock: PhaseClock, log: Any) -> None:
    """Follow the phase, and say every few seconds how much is left."""
    said_at = now()
    while True:
        if fleet.phase < Phase.SWEEPING:
            clock.advance(fleet.phase, jobs=len(fleet.ledger.running))
        due = said_at + REPORT
        changed = await fleet.changed.until(
            lambda: clock.phase < fleet.phase < Phase.SWEEPING, functools.partial(float, due)
        )
        if not changed:
            said_at = now()
            jobs, left = len(fleet.ledger.running), round(countdown.grace_left)
            log.info("waiting for jobs", phase=clock.phase.text, jobs=jobs, seconds_left=left)
