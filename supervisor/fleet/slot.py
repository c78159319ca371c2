"""One slot: keeps a program up, starts another after a failure, or beside the old one when asked to.

A slot has one current generation, for a moment a candidate that is to take its place, and behind it any
number that are on their way out and finish their jobs.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from lastcall.supervisor.fleet import stopper
from lastcall.supervisor.fleet.generation import Generation
from lastcall.supervisor.fleet.restarts import Restarts
from lastcall.supervisor.fleet.shared import Shared
from lastcall.supervisor.fleet.states import SlotEvent as E
from lastcall.supervisor.fleet.states import SlotState as S
from lastcall.supervisor.fleet.stop_steps import Ending
from lastcall.supervisor.processes.launch import Launcher
from lastcall.supervisor.receipt import JobEntry
from lastcall.worker.base.budget import plan, plan_of_stalled
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.wire import StopCause

# Seconds before a worker that was signalled itself is replaced, if no stop has followed. Ours: a stop of a
# whole control group reaches a worker as often before the supervisor as after, some milliseconds apart.
REPLACE_SIGNALLED_AFTER = 0.5
# Seconds for which the old worker waits for the new one to accept. Ours: its beat comes within milliseconds.
ACCEPTS_WITHIN = 2.0


class Slot:
    """The place that one worker is supervised in; it survives replacements."""

    def __init__(
        self,
        number: int,
        *,
        launcher: Launcher,
        restarts: Restarts,
        shared: Shared,
        on_fault: Callable[[int, Exception], None],
    ) -> None:
        self.number = number
        self.changed = Condition()
        self.restarts: Counter[str] = Counter()
        self.last_exit = ""
        self.first_load_over = False
        self.config_error = ""
        self.launcher = launcher
        self.candidate: Generation | None = None
        self.leaving: list[Generation] = []
        self._restarts = restarts
        self._shared = shared
        self._on_fault = on_fault
        self._numbers = 0
        self._stop_asked = False
        self._retry_now = False
        # The program of the next start alone: a reload tries it in a slot where nothing serves.
        self._trial: Launcher | None = None
        self._group: asyncio.TaskGroup | None = None
        self._replacing = asyncio.Lock()
        self._last_started: Generation | None = None
        self.current = self._make(S.STOPPED)

    # -- what others see ------------------------------------------------------------------------------

    @property
    def generations(self) -> list[Generation]:
        """Every generation that there is something to say of, the current one first."""
        candidate = [] if self.candidate is None else [self.candidate]
        return [self.current, *candidate, *self.leaving]

    @property
    def state(self) -> S:
        return self.current.state

    @property
    def generation(self) -> int:
        return self.current.number

    @property
    def is_alive(self) -> bool:
        return any(generation.is_alive for generation in self.generations)

    @property
    def works(self) -> bool:
        return any(generation.works for generation in self.generations)

    @property
    def accepts(self) -> bool:
        return any(generation.accepts for generation in self.generations)

    @property
    def jobs(self) -> list[JobEntry]:
        return [job for generation in self.generations for job in generation.jobs]

    @property
    def is_stopping(self) -> bool:
        return self._stop_asked

    # -- life -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep a program up until the slot is stopped."""
        async with asyncio.TaskGroup() as self._group:
            # An exception that left this block would cancel what runs in it, the workers' lives.
            try:
                await self._keep_up()
            except Exception as error:
                self._on_fault(self.number, error)
        # The group has ended, and each generation with it.
        if self.current.state is not S.STOPPED:
            self.current.change(E.STOP)

    async def _keep_up(self) -> None:
        if not self._stop_asked:
            self._start_current()
        while True:
            await self.changed.until(lambda: self._stop_asked or self._needs_another())
            if self._stop_asked:
                return
            await self._next()

    def _needs_another(self) -> bool:
        # After a wrong target nothing is tried again: no later start would find a better one.
        return not self.config_error and (self.current.ended or self.current.is_leaving)

    async def _next(self) -> None:
        """The current generation has failed, or is leaving unasked: another takes its place."""
        old = self.current
        is_alive = not old.ended
        if is_alive:
            self._let_go(old, old.leaves_because)
        if self.candidate is not None:
            self.current, self.candidate = self.candidate, None
            self.current.take_over()
            return
        uptime = 0.0 if old.ready_at is None else now() - old.ready_at
        was_loaded = old.is_opaque or is_alive or (old.reports.is_loaded and not old.failed_cold)
        delay = self._restarts.delay(now(), uptime=uptime, was_loaded=was_loaded)
        why = "left" if is_alive else old.end_kind
        self.current = self._make(S.FAILED)
        if delay is None:
            self.current.change(E.QUARANTINE, reason="too many failures", last_exit=self.last_exit)
            await self.changed.until(lambda: self._stop_asked or self._retry_now)
            if self._stop_asked:
                return
            delay = 0.0
        self.current.change(E.RETRY, delay=round(delay, 3))
        due = now() + (max(delay, REPLACE_SIGNALLED_AFTER) if is_alive else delay)
        await self.changed.until(lambda: self._stop_asked or self._retry_now, lambda: due)
        self._retry_now = False
        if not self._stop_asked:
            self.restarts[why] += 1
            self._start_current()

    def _start_current(self) -> None:
        if self._trial is not None:
            self.current.launcher, self._trial = self._trial, None
        self._start(self.current)

    def _make(self, state: S, launcher: Launcher | None = None) -> Generation:
        self._numbers += 1
        return Generation(
            self.number,
            self._numbers,
            launcher=launcher or self.launcher,
            shared=self._shared,
            changed=self.changed,
            state=state,
        )

    def _start(self, generation: Generation) -> None:
        assert self._group is not None
        self._last_started = generation
        generation.is_launching = True
        self._group.create_task(self._live(generation), name=f"slot-{self.number}-{generation.number}")

    async def _live(self, generation: Generation) -> None:
        try:
            await generation.live()
        except Exception as error:
            # A fault of lastcall must cut no call: it becomes a reason for the ordinary stop.
            self._on_fault(self.number, error)
            try:
                await generation.see_out()
            except Exception as second:  # once more would be the end of the other workers, and of their calls
                self._on_fault(self.number, second)
        finally:
            self.last_exit = generation.last_exit or self.last_exit
            self.first_load_over = True
            if self.number == 0 and generation.number == 1:
                self.config_error = generation.config_error
            self.changed.notify()
        await self._guarded(generation.finish_sweep())

    # -- one generation after the other, without a gap ------------------------------------------------

    async def replace(
        self,
        reason: str,
        launcher: Launcher,
        *,
        cause: StopCause,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> str:
        """Start another generation, and let the current one go once the other has taken over.

        Returns why that did not come about, or nothing when it did. Only a program that has taken over is the
        one of later starts.
        """
        async with self._replacing:
            if self._stop_asked:
                return "the slot is being stopped"
            if not is_wanted():
                return "no longer needed"
            # While its image is made, the worker is neither there to be replaced nor has it failed to start.
            await self.changed.until(lambda: not self.current.is_launching or self._stop_asked)
            if self._stop_asked:
                return "the slot is being stopped"
            old = self.current
            new = self._begin_beside(launcher) if old.is_alive else await self._begin_instead(launcher)
            if new is None:
                return "the slot is being stopped"
            await self._until_usable(new, is_wanted)
            if new.is_usable and is_wanted() and not self._stop_asked:
                self.launcher = launcher
                await self._let_in(new)
                if new is self.candidate:
                    self.current, self.candidate = new, None
                    self._let_go(old, reason, cause)
                return ""
            return self._give_up(new, is_wanted)

    def _begin_beside(self, launcher: Launcher) -> Generation:
        self.candidate = self._make(S.STOPPED, launcher)
        self.candidate.is_candidate = True
        self._start(self.candidate)
        return self.candidate

    async def _begin_instead(self, launcher: Launcher) -> Generation | None:
        """Nothing serves here at the moment: wake the slot from its back-off, or its quarantine."""
        self._restarts.forget()
        self._trial = launcher
        before, self._retry_now = self._last_started, True
        self.changed.notify()
        await self.changed.until(lambda: self._last_started is not before or self._stop_asked)
        return None if self._stop_asked else self._last_started

    async def _let_in(self, new: Generation) -> None:
        """Have the new one accept before the old one stops to; a moment, and no more than ACCEPTS_WITHIN."""
        new.take_over()
        due = now() + ACCEPTS_WITHIN
        await self.changed.until(
            lambda: new.accepts or self._shared.is_held or new.ended or self._stop_asked, lambda: due
        )

    async def _until_usable(self, new: Generation, is_wanted: Callable[[], bool]) -> None:
        def is_decided() -> bool:
            return new.ended or new.is_usable or new.is_leaving or self._stop_asked or not is_wanted()

        # While its image is made, its time to register has not begun. A launch always comes to its end.
        await self.changed.until(lambda: not new.is_launching or is_decided())
        # It ends by itself when it does not register in time; it may still never be warm.
        due = now() + self._shared.config.start.timeout
        await self.changed.until(lambda: is_decided() or (new.is_opaque and new.was_ready), lambda: due)
        if new.is_opaque and new.was_ready:
            await self.changed.until(is_decided, lambda: new.usable_at)

    def _give_up(self, new: Generation, is_wanted: Callable[[], bool]) -> str:
        if self._stop_asked:
            return "the slot is being stopped"  # the stop takes the candidate along
        why = new.last_exit or ("it left again" if new.is_leaving else new.missing)
        if self.candidate is new:
            self.candidate = None
            if not new.ended:  # it may have taken a job already, so it drains like any other
                why = why if is_wanted() else "no longer needed"
                self._let_go(new, why)
        return why

    def _let_go(self, old: Generation, reason: str, cause: StopCause = "stop") -> None:
        """Have a generation drain for as long as grace lets it, behind the one that took its place."""
        assert self._group is not None
        self.leaving.append(old)
        self._group.create_task(
            self._guarded(self._see_off(old, reason, cause)), name=f"see-off-{self.number}-{old.number}"
        )

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self._on_fault(self.number, error)

    async def _see_off(self, old: Generation, reason: str, cause: StopCause) -> None:
        config = self._shared.config
        if old.state is S.STALLED:
            # Its jobs have the grace of a stall. A worker that beats again meanwhile has all of grace.
            deadlines = plan_of_stalled(now(), config.stall.grace, config.stop.kill)
            retirement = Ending(reason=reason, deadlines=deadlines, cause=cause)
            async with asyncio.TaskGroup() as group:
                recovering = group.create_task(self._extend_if_it_recovers(old, retirement))
                await stopper.stop(old, retirement)
                recovering.cancel()
        else:
            deadlines = plan(now(), config.grace, config.stop.shares)
            await stopper.stop(old, Ending(reason=reason, deadlines=deadlines, cause=cause))
        await self.changed.until(lambda: old.ended)
        self.leaving.remove(old)
        self._shared.on_change()

    async def _extend_if_it_recovers(self, old: Generation, retirement: Ending) -> None:
        await self.changed.until(lambda: not old.is_silent)
        config = self._shared.config
        retirement.deadlines = plan(now(), config.grace, config.stop.shares)
        self.changed.notify()

    # -- the stop -------------------------------------------------------------------------------------

    def begin_stop(self, ending: Ending) -> None:
        """Give every generation the reason to stop; `stop` does the rest."""
        self._stop_asked = True
        for generation in self.generations:
            stopper.begin(generation, ending)

    async def stop(self, ending: Ending) -> None:
        """Stop every generation, all at once."""
        self._stop_asked = True
        self.changed.notify()
        async with asyncio.TaskGroup() as group:
            for generation in self.generations:
                group.create_task(stopper.stop(generation, ending))

    def dump(self) -> None:
        for generation in self.generations:
            generation.dump()
