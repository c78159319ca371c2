"""Keeps the service manager informed, from within the supervision loop.

The watchdog is fed by the same loop that supervises, woken by the same changed: a supervisor that no longer
turns feeds nobody. Without a service manager nothing runs here at all.
"""

from __future__ import annotations

from lastcall.supervisor.fleet.states import Phase, SlotState
from lastcall.supervisor.views.sd_notify import Herald, Manager, Snapshot
from lastcall.supervisor.views.status import View
from lastcall.worker.base.clock import now

# A slot in one of these has not been started yet, or is being started; `restarts` tells the first time.
_COMING_UP = (SlotState.STOPPED, SlotState.STARTING)


class Announcer:
    """Tells the service manager what the view shows."""

    def __init__(self, view: View, manager: Manager, *, is_opaque: bool) -> None:
        self._view = view
        self._manager = manager
        self._is_opaque = is_opaque
        self._reloads = 0
        self._herald = Herald(watchdog=manager.watchdog)
        self._told = Snapshot()

    async def run(self) -> None:
        """Announce every change, and what is due between changes, until cancelled."""
        if not self._manager.is_there:
            return
        try:
            while True:
                self._announce()
                await self._view.fleet.changed.until(
                    lambda: self._snapshot() != self._told, self._herald.due_at
                )
        finally:
            self._manager.close()

    def reloading(self, by: int) -> None:
        """Hear that a reload has begun (1) or is over (-1); said at once, for it may be over in a moment."""
        self._reloads += by
        if self._manager.is_there:
            self._announce()

    def _announce(self) -> None:
        self._told = self._snapshot()
        self._manager.tell(self._herald.speak(self._told, now()))

    def _snapshot(self) -> Snapshot:
        view, fleet = self._view, self._view.fleet
        jobs, accepting = len(fleet.ledger.running), sum(slot.accepts for slot in fleet.slots)
        settled = not any(slot.state in _COMING_UP and not slot.restarts for slot in fleet.slots)
        countdown = view.countdown
        counted = f"{jobs} job{'' if jobs == 1 else 's'}"
        if countdown is None:
            text = f"{view.phase.text}: {accepting} of {len(fleet.slots)} workers accept, {counted}"
        else:
            text = f"{max(view.phase, Phase.FENCING).text}: {counted}"
        return Snapshot(
            # Once said it stays said: a worker that reconnects later is no second start.
            is_ready=self._told.is_ready or (fleet.accepts and settled),
            is_reloading=self._reloads > 0,
            # What an opaque worker still does can't be counted, so its being there has to do.
            is_busy=jobs > 0 or (self._is_opaque and any(slot.is_alive for slot in fleet.slots)),
            end_at=None if countdown is None else countdown.deadlines.end_at,
            text=text,
        )
