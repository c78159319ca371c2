"""All slots together: when each may start first, and what they amount to."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from worker.clock import Bell, now

from . import family
from .config import Config
from .intensity import RestartPolicy, Restarts
from .launch import Launcher
from .receipt import Ledger, StopRecord
from .slot import Shared, Slot
from .states import PHASE_OF, Phase, SlotState


class Fleet:
    """The slots of a supervisor. `bell` rings whenever anything about any of them has changed."""

    def __init__(
        self,
        config: Config,
        *,
        launcher: Launcher,
        ledger: Ledger,
        record: StopRecord,
        log: Any,
        rng: random.Random,
        sweep_unmarked: bool,
    ) -> None:
        self.bell = Bell()
        self.ledger = ledger
        self.shared = Shared(
            ledger=ledger,
            record=record,
            log=log,
            known_pids=set(),
            on_change=self.bell.ring,
            sweep_unmarked=sweep_unmarked and config.workers == 1,
            fence_seconds=[],
        )
        policy = RestartPolicy(
            intensity=config.restart.intensity,
            period=config.restart.period,
            first=config.restart.backoff[0],
            cap=config.restart.backoff[1],
        )
        self._stagger = 0.0 if config.is_opaque else config.start.stagger
        self._stopping = False
        self.fault = ""
        self.slots = [
            Slot(
                number,
                launcher=launcher,
                restarts=Restarts(policy, rng),
                shared=self.shared,
                start_timeout=config.start.timeout,
            )
            for number in range(config.workers)
        ]

    @property
    def is_quarantined(self) -> bool:
        return all(slot.state is SlotState.QUARANTINED for slot in self.slots)

    @property
    def accepts(self) -> bool:
        return any(slot.accepts for slot in self.slots)

    @property
    def config_error(self) -> str:
        return self.slots[0].config_error

    @property
    def phase(self) -> Phase:
        """The phase of a stop: that of the worker that is furthest from its end."""
        phases = [
            Phase.FENCING if slot.is_fencing else PHASE_OF[slot.state] for slot in self.slots if slot.is_alive
        ]
        return min(phases, default=Phase.SWEEPING)

    async def run(self) -> None:
        """Run every slot to its end."""
        async with asyncio.TaskGroup() as group:
            for slot in self.slots:
                if slot.number > 0 and not await self._may_start(slot):
                    return
                group.create_task(self._run(slot), name=f"slot-{slot.number}")
                if slot.number % 16 == 15:
                    await asyncio.sleep(0)  # let the first ones speak while the rest are being started

    async def _run(self, slot: Slot) -> None:
        try:
            await slot.run()
        except Exception as error:
            # A fault of ours must cut no call: it becomes a reason to stop, and the stop is the ordinary one.
            self.fault = f"slot {slot.number}: {error!r}"
            self.shared.log.error("fault in lastcall", slot=slot.number, exc_info=True)
            self.bell.ring()
            await slot.see_out()

    def fence(self, reason: str) -> None:
        """Begin the stop where it is urgent: every worker is told to accept nothing more, at once."""
        self._stopping = True
        for slot in self.slots:
            slot.fence(reason)

    def begin_stop(self) -> None:
        """Start no slot that has not been started yet."""
        self._stopping = True
        self.bell.ring()

    async def _may_start(self, slot: Slot) -> bool:
        """Wait for slot 0's first load, which decides whether the target is any good, and for the stagger."""
        if self._stagger > 0:
            await self.bell.until(lambda: self._stopping or self.slots[0].first_load_over)
            due = now() + self._stagger
            await self.bell.until(lambda: self._stopping, lambda: due)
        return not self._stopping

    async def sweep(self, supervisor_id: str, deadline: float, *, inherits_orphans: bool) -> None:
        """At the end of a stop: no descendant is left, whoever it belonged to.

        A subreaper finds every descendant below itself; otherwise the whole machine has to be looked at.
        """
        record = self.shared.record
        counted: set[int] = set()
        while True:
            left = [family.each(pid) for pid in family.adopted(self.shared.known_pids)]
            below = [process for process in left if process is not None]
            below += [child for process in list(below) for child in family.tree(process.pid)]
            if not inherits_orphans:
                below += family.everywhere(supervisor_id + ":")
            found = {process.pid: process for process in below}
            if not found:
                return
            programs = [p for p in found.values() if not family.is_framework(p)]
            record.swept += sum(1 for process in programs if process.pid not in counted)
            counted.update(process.pid for process in programs)
            family.kill(found.values())
            if now() >= deadline:
                record.left += len(found)
                return
            await asyncio.sleep(0.005)
