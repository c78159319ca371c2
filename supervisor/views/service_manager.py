"""Keeps the service manager informed, from within the supervision loop.

The watchdog is fed by the same loop that supervises, woken by the same condition: a supervisor that no longer
turns feeds no watchdog. Without a service manager nothing runs here at all.
"""

from __future__ import annotations

import time

from lastcall.supervisor.fleet.fleet import Fleet
from lastcall.supervisor.fleet.states import SlotState
from lastcall.supervisor.shutdown import Shutdown
from lastcall.supervisor.views.sd_notify import Notifications, NotifySocket, Snapshot
from lastcall.worker.base.clock import now
from lastcall.worker.base.plurals import counted

# Characters of a STATUS that are for the reason of a failed reload. Ours: `systemctl status` shows one line.
MAX_REASON = 200

# A slot in one of these has not been started yet, or is being started; `restarts` tells the first time.
_COMING_UP = (SlotState.STOPPED, SlotState.STARTING)


class Announcer:
    """Tells the service manager of the fleet and its stop."""

    def __init__(self, fleet: Fleet, shutdown: Shutdown, manager: NotifySocket, *, is_opaque: bool) -> None:
        self._fleet = fleet
        self._shutdown = shutdown
        self._manager = manager
        self._is_opaque = is_opaque
        self._reloads = 0
        # Since when reloads have failed, by the clock on the wall, and why the last one has.
        self._failing = ""
        self._failing_since = ""
        self._notifications = Notifications(watchdog=manager.watchdog)
        self._told = Snapshot()

    async def run(self) -> None:
        """Announce every change, and what is due between changes, until cancelled."""
        if not self._manager.is_there:
            return
        try:
            while True:
                self._announce()
                await self._fleet.changed.until(
                    lambda: self._snapshot() != self._told, self._notifications.due_at
                )
        finally:
            self._manager.close()

    def reloading(self, by: int, failure: str = "") -> None:
        """Hear that a reload has begun (1) or is over (-1); said at once, for it may be over in a moment.

        The protocol has no word for a reload that has failed: READY=1 ends it, and `systemctl reload` returns
        0. So the STATUS has the `failure`, and since when reloads fail, until one succeeds.
        """
        self._reloads += by
        if by < 0:
            self._failing = " ".join(failure.split())[:MAX_REASON]
            if not self._failing:
                self._failing_since = ""
            elif not self._failing_since:
                self._failing_since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if self._manager.is_there:
            self._announce()

    def _announce(self) -> None:
        self._told = self._snapshot()
        self._manager.tell(self._notifications.due(self._told, now()))

    def _up_at(self) -> float | None:
        """Return by when the workers that start for the first time, or for a reload, have to be ready.

        A start that is repeated after a failure is not waited for: the service manager's own timer holds.
        """
        is_reload = self._reloads > 0
        if self._told.is_ready and not is_reload:
            return None
        slots = [slot for slot in self._fleet.slots if is_reload or not slot.restarts]
        dues = [generation.ready_by for slot in slots for generation in slot.generations]
        return max((due for due in dues if due is not None), default=None)

    def _snapshot(self) -> Snapshot:
        fleet, stop, phase = self._fleet, self._shutdown.stop, self._shutdown.phase
        jobs, accepting = len(fleet.ledger.running), sum(slot.accepts for slot in fleet.slots)
        settled = not any(slot.state in _COMING_UP and not slot.restarts for slot in fleet.slots)
        if stop is None:
            workers = counted(len(fleet.slots), "worker")
            text = f"{phase.text}: {accepting} of {workers} accepting, {counted(jobs, 'job')}"
            if fleet.full_time.reasons:
                text += f"; full: {', '.join(fleet.full_time.reasons)}"
            if self._failing:
                text += f"; reload failing since {self._failing_since}: {self._failing}"
        else:
            text = f"{phase.text}: {counted(jobs, 'job')}"
        return Snapshot(
            # Once said it stays said: a worker that reconnects later is no second start.
            is_ready=self._told.is_ready or (fleet.works and settled),
            is_reloading=self._reloads > 0,
            # The work of an opaque program can't be counted, so its being there has to do.
            is_busy=jobs > 0 or (self._is_opaque and any(slot.is_alive for slot in fleet.slots)),
            end_at=None if stop is None else stop.deadlines.end_at,
            up_at=self._up_at(),
            text=text,
        )
