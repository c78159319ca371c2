"""All slots together: when each may start first, how many there are, and what they amount to."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from typing import Any

from lastcall.supervisor.config import Config
from lastcall.supervisor.fleet import stopper
from lastcall.supervisor.fleet.full_time import FullTime
from lastcall.supervisor.fleet.generation import Generation
from lastcall.supervisor.fleet.histogram import Histogram
from lastcall.supervisor.fleet.restarts import RestartPolicy, Restarts
from lastcall.supervisor.fleet.shared import Shared
from lastcall.supervisor.fleet.slot import Slot
from lastcall.supervisor.fleet.states import PHASE_OF, Phase, SlotState
from lastcall.supervisor.fleet.stop_steps import Ending
from lastcall.supervisor.processes import descendants
from lastcall.supervisor.processes.launch import Launcher
from lastcall.supervisor.receipt import Ledger, StopRecord
from lastcall.worker.base.budget import plan
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.process import TRACKER_ENDS_WITHIN
from lastcall.worker.base.wire import Fence

# Upper bounds of the histograms, in seconds. Ours: around the fences of docs/performance.md, and from a short
# call to two hours for a drain.
FENCE_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
DRAIN_BOUNDS = (0.1, 1, 5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)
# Workers started in one turn of the loop. Ours: posix_spawn takes about a millisecond.
STARTS_PER_TURN = 16
# Seconds between two looks of the last sweep, the first and the longest. Ours: what was killed takes about as
# long as the first to become a zombie, and to look costs milliseconds of processor time.
SWEEP_AGAIN_AFTER = 0.005
SWEEP_AGAIN_AT_MOST = 0.1


class Fleet:
    """The slots of a supervisor. `changed` is notified whenever anything about any of them has changed."""

    def __init__(
        self,
        config: Config,
        *,
        changed: Condition,
        launcher: Launcher,
        ledger: Ledger,
        record: StopRecord,
        log: Any,
        rng: random.Random,
        sweep_unmarked: bool,
        known_pids: set[int],
    ) -> None:
        self.changed = changed
        self.ledger = ledger
        self.launcher = launcher
        self.fault = ""
        self.full_time = FullTime()
        self.shared = Shared(
            config=config,
            ledger=ledger,
            record=record,
            log=log,
            known_pids=known_pids,
            on_change=self._on_change,
            may_sweep_unmarked=lambda: sweep_unmarked and self._is_alone(),
            fence_seconds=Histogram(FENCE_BOUNDS),
            drain_seconds=Histogram(DRAIN_BOUNDS),
        )
        self._rng = rng
        # The processes that lastcall does not end. Those that it does end are never known again.
        self._spared_pids = frozenset(known_pids)
        self._group: asyncio.TaskGroup | None = None
        self.slots = [self._make(number) for number in range(config.workers)]

    # -- what others see ------------------------------------------------------------------------------

    @property
    def config(self) -> Config:
        return self.shared.config

    @property
    def generations(self) -> Iterator[Generation]:
        return (generation for slot in self.slots for generation in slot.generations)

    @property
    def image_pids(self) -> set[int]:
        """The processes that workers are forked from; in a reload there are two."""
        launchers = (self.launcher, *(generation.launcher for generation in self.generations))
        images = (launcher.image for launcher in launchers)
        return {image.pid for image in images if image is not None and image.pid is not None}

    def find(self, slot: int, number: int) -> Generation | None:
        """Return a generation of a slot, if there is something to say of it."""
        return next((each for each in self.generations if (each.slot, each.number) == (slot, number)), None)

    @property
    def is_quarantined(self) -> bool:
        return all(slot.state is SlotState.QUARANTINED for slot in self.slots)

    @property
    def works(self) -> bool:
        """Whether the supervisor is ready.

        Load, cap and hold take nothing away: a platform would stop a rollout for a busy host.
        """
        return any(slot.works for slot in self.slots)

    @property
    def accepts(self) -> bool:
        return any(slot.accepts for slot in self.slots)

    def note_full(self) -> None:
        """Bring `full_time` up to now."""
        reasons: set[str] = set()
        # Asked at each beat of each worker: the first one that accepts has to be enough.
        if not self.is_stopping and not self.accepts:
            reasons = {each.full_because for each in self.generations if not each.is_candidate}
        self.full_time.note(reasons, now())

    def _on_change(self) -> None:
        self.note_full()
        self.changed.notify()

    @property
    def is_held(self) -> bool:
        return self.shared.is_held

    @property
    def is_stopping(self) -> bool:
        return self.shared.is_stopping

    @property
    def last_exit(self) -> str:
        """How a worker ended that was not asked to, of the first slot that had one; empty while none has."""
        return next((slot.last_exit for slot in self.slots if slot.last_exit), "")

    @property
    def config_error(self) -> str:
        return next((slot.config_error for slot in self.slots), "")

    @property
    def phase(self) -> Phase:
        """The phase of a stop: that of the worker that is furthest from its end."""
        phases = [
            Phase.FENCING if generation.is_fencing else PHASE_OF[generation.state]
            for generation in self.generations
            if generation.is_alive
        ]
        return min(phases, default=Phase.SWEEPING)

    def slot(self, number: int) -> Slot | None:
        return next((slot for slot in self.slots if slot.number == number), None)

    def _is_alone(self) -> bool:
        """Whether whatever lost its parent and its marks can only be the one program's."""
        return sum(1 for generation in self.generations if not generation.ended) <= 1

    # -- life -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run every slot to its end."""
        async with asyncio.TaskGroup() as self._group:
            for number, slot in enumerate(list(self.slots)):
                if number > 0 and not await self._may_start():
                    return
                self._begin(slot)
                if (number + 1) % STARTS_PER_TURN == 0:
                    await asyncio.sleep(0)  # the first ones are heard while the rest are being started
            await self.changed.until(lambda: self.is_stopping)

    def _make(self, number: int) -> Slot:
        restart = self.config.restart
        policy = RestartPolicy(
            intensity=restart.intensity,
            period=restart.period,
            first=restart.backoff[0],
            cap=restart.backoff[1],
        )
        return Slot(
            number,
            launcher=self.launcher,
            restarts=Restarts(policy, self._rng),
            shared=self.shared,
            on_fault=lambda slot, error: self.on_fault(f"slot {slot}", error),
        )

    def _begin(self, slot: Slot) -> None:
        assert self._group is not None
        self._group.create_task(slot.run(), name=f"slot-{slot.number}")

    def on_fault(self, where: str, error: Exception) -> None:
        """Make a fault of lastcall a reason for the ordinary stop: it must cut no call."""
        self.fault = f"{where}: {error!r}"
        self.shared.log.error("fault in lastcall", where=where, exc_info=error)
        self.changed.notify()

    async def _may_start(self) -> bool:
        """Wait for slot 0's first load, which decides whether the target is any good, and for the stagger."""
        stagger = 0.0 if self.launcher.is_opaque else self.config.start.stagger
        if stagger > 0:
            await self.changed.until(lambda: self.is_stopping or self._first_is_loaded())
            image = self.launcher.image
            # A fork takes a tenth of the processor time that a start takes which imports.
            due = now() + (0.0 if image is not None and image.is_ready else stagger)
            await self.changed.until(lambda: self.is_stopping, lambda: due)
        return not self.is_stopping

    def _first_is_loaded(self) -> bool:
        first = self.slots[0]
        return first.first_load_over or first.current.reports.is_loaded

    # -- changes of the whole -------------------------------------------------------------------------

    def commit(self, config: Config, launcher: Launcher) -> None:
        """From now on every start is of this program, under this configuration."""
        self.shared.config = config
        if self.launcher is not launcher:
            self.launcher.end_image()
        self.launcher = launcher
        for slot in self.slots:
            slot.launcher = launcher

    def hold(self, on: bool) -> None:
        """Have no worker accept anything for as long as the hold lasts, those to come included."""
        self.shared.is_held = on
        for generation in self.generations:
            generation.hold(on)
        self.changed.notify()

    async def grow(self) -> Slot | None:
        """Add one slot and start it; None when a stop has begun."""
        if not await self._may_start():
            return None
        taken = {slot.number for slot in self.slots}
        slot = self._make(next(n for n in range(len(taken) + 1) if n not in taken))
        self.slots.append(slot)
        self.slots.sort(key=lambda each: each.number)
        self._begin(slot)
        return slot

    async def shrink(self, slot: Slot, reason: str) -> None:
        """Drain one slot for as long as grace lets it, and take it away."""
        config = self.config
        ending = Ending(reason=reason, deadlines=plan(now(), config.grace, config.stop.shares))
        await slot.stop(ending)
        await self.changed.until(lambda: all(generation.ended for generation in slot.generations))
        if not self.is_stopping:
            self.slots.remove(slot)
        self.changed.notify()

    # -- the stop -------------------------------------------------------------------------------------

    def fence(self, reason: str) -> None:
        """Tell every worker at once to accept nothing more, because the supervisor stops."""
        stopper.fence(self.generations, Fence(reason=reason, cause="stop"))

    def begin_stop(self, ending: Ending) -> None:
        """Begin the stop of every worker. From now on no slot starts anything; `Slot.stop` does the rest."""
        self.shared.is_stopping = True
        for slot in self.slots:
            slot.begin_stop(ending)
        self.ledger.begin_stop()
        self.changed.notify()

    def end_images(self) -> None:
        """End the processes that workers are forked from: a stop starts none."""
        for launcher in (self.launcher, *(generation.launcher for generation in self.generations)):
            launcher.end_image()

    def wake(self) -> None:
        """Have every waiter of a slot, or of the fleet, look again: a deadline has moved."""
        for slot in self.slots:
            slot.changed.notify()
        self.changed.notify()

    def abandon(self) -> None:
        """After a fault of lastcall: leave the workers alone. They see the supervisor's end, and drain."""
        self.shared.is_abandoned = True

    async def sweep(
        self, supervisor_id: str, deadline: Callable[[], float], *, inherits_orphans: bool
    ) -> None:
        """At the end of a stop, kill every descendant that is left, and count those that the deadline leaves.

        A subreaper finds every descendant below itself; otherwise the whole machine has to be looked at. A
        worker or a broker that was killed, and has not died yet, is one of them.
        """
        record = self.shared.record
        pause, began = SWEEP_AGAIN_AFTER, now()
        while True:
            left = [descendants.each(pid) for pid in descendants.adopted(self._spared_pids)]
            below = [process for process in left if process is not None]
            below += [child for process in list(below) for child in descendants.tree(process.pid)]
            if not inherits_orphans:
                below += descendants.everywhere(supervisor_id + ":")
            found = {process.pid: process for process in below}
            if not found:
                return
            # A process that lastcall has started is no program that a job left behind.
            record.swept += self.shared.swept.add(
                process for process in found.values() if process.pid not in self.shared.known_pids
            )
            spared_until = min(began + TRACKER_ENDS_WITHIN, deadline())
            descendants.kill(found.values(), spares_trackers=now() < spared_until)
            if now() >= deadline():
                record.left = len(found)
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, SWEEP_AGAIN_AT_MOST)


def pick_victims(slots: list[Slot], count: int) -> list[Slot]:
    """Choose the slots to take away: those with the fewest jobs, of equals the youngest."""
    serving = [slot for slot in slots if not slot.is_stopping]

    def order(slot: Slot) -> tuple[bool, int, int]:
        return slot.accepts, len(slot.jobs), -slot.number

    return sorted(serving, key=order)[:count]
