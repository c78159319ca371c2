"""The stop of one generation: fence, drain, close, terminate, kill; each only as far as is needed.

A generation is stopped because the supervisor stops, or because another has taken its place; both may happen
to the same one. Whatever the reasons are, the earliest of their deadlines hold.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any, Protocol

from lastcall.supervisor.fleet.states import SlotEvent as E
from lastcall.supervisor.fleet.states import SlotState as S
from lastcall.supervisor.fleet.worker_view import WorkerView
from lastcall.worker.base.budget import Deadlines, earliest
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.wire import Drain, Fence, Terminate, WorkerHears

# What the kernel may take to end a process that was sent SIGKILL.
KILLED_IN = 4.0


class Ending(Protocol):
    """Why a generation is stopped, and by when; the deadlines may move while one waits."""

    reason: str
    deadlines: Deadlines


class Stoppable(Protocol):
    """What of a generation its stop works with."""

    state: S
    changed: Condition
    log: Any
    reports: WorkerView
    is_silent: bool

    @property
    def is_alive(self) -> bool: ...
    @property
    def is_opaque(self) -> bool: ...
    @property
    def has_exited(self) -> bool: ...
    @property
    def was_ready(self) -> bool: ...
    def has_living_jobs(self) -> bool: ...
    def change(self, event: E, **why: Any) -> None: ...
    def say(self, message: WorkerHears) -> None: ...
    def send(self, number: signal.Signals) -> None: ...
    def kill(self) -> None: ...
    def on_fence(self, seconds: float | None) -> None:
        """Hear how long the acknowledgement of the fence took; None when it did not come in time."""


class Stopper:
    """Takes one generation through its stop."""

    def __init__(self, generation: Stoppable) -> None:
        self._generation = generation
        self._endings: list[Ending] = []
        self._fence_sent_at: float | None = None
        self._reason = ""
        self.is_fencing = False

    @property
    def is_asked(self) -> bool:
        return bool(self._endings) or self._fence_sent_at is not None

    @property
    def deadlines(self) -> Deadlines:
        return earliest(ending.deadlines for ending in self._endings)

    def fence(self, reason: str) -> None:
        """Tell the worker to accept nothing more; `stop` does the rest."""
        self._fence_sent_at = now()
        self._reason = reason
        self._generation.say(Fence(reason=reason))

    def repeat(self) -> None:
        """Say again what was said before there was a channel to say it on."""
        if self._fence_sent_at is not None:
            self._generation.say(Fence(reason=self._reason))
        if self._endings:
            self.tell_drain()

    async def stop(self, ending: Ending) -> None:
        """Stop, or join the stop that is under way with one more deadline."""
        generation = self._generation
        self._endings.append(ending)
        generation.changed.notify()
        if not generation.is_alive:
            return
        if len(self._endings) > 1:
            self.tell_drain()
            await self._until_exit(lambda: self.deadlines.terminate_at + KILLED_IN)
            return
        if generation.state not in (S.DRAINING, S.TERMINATING, S.KILLING):
            generation.change(E.FENCE, reason=ending.reason)
        if generation.is_opaque:
            # Once: a second SIGTERM makes many programs, livekit's own command line too, drop their calls.
            generation.send(signal.SIGTERM)
            await self._until_exit(lambda: self.deadlines.terminate_at)
        elif generation.state is S.TERMINATING:  # being taken down already, for not becoming ready
            await self._until_exit(lambda: self.deadlines.terminate_at)
        else:
            await self._stop_worker()
        if not generation.has_exited:
            if generation.state is not S.KILLING:
                generation.change(E.KILL)
            generation.kill()
            await self._until_exit(lambda: self.deadlines.terminate_at + KILLED_IN)

    async def _stop_worker(self) -> None:
        generation = self._generation
        if self._fence_sent_at is None:
            self.fence(self._endings[0].reason)
        self.tell_drain()
        if generation.was_ready:
            await self._await_fence()
            drained = await generation.changed.until(self._is_drained, lambda: self.deadlines.drain_at)
            if not drained or not generation.reports.is_drained:
                self._tell(self.deadlines.hurried(now()))
        if generation.has_exited:
            return
        generation.change(E.CLOSE)
        # A worker that drained early has its close share from now, and not the rest of grace to hang in.
        shares = self.deadlines.shares
        has_something_to_close = generation.was_ready and not generation.is_silent
        close_by = now() + (shares.close if has_something_to_close else shares.terminate)
        if await self._until_exit(lambda: min(close_by, self.deadlines.close_at)):
            return
        generation.change(E.TERMINATE)
        generation.say(Terminate())
        terminate_by = now() + shares.terminate
        await self._until_exit(lambda: min(terminate_by, self.deadlines.terminate_at))

    async def _await_fence(self) -> None:
        generation = self._generation
        began = now() if self._fence_sent_at is None else self._fence_sent_at
        self.is_fencing = True
        try:
            answered = await generation.changed.until(
                lambda: generation.has_exited or generation.reports.fenced_at is not None,
                lambda: self.deadlines.fence_at,
            )
        finally:
            self.is_fencing = False
        fenced_at = generation.reports.fenced_at
        if fenced_at is not None:
            generation.on_fence(max(0.0, fenced_at - began))
        elif not answered:
            generation.log.warning("fence not acknowledged", after=round(now() - began, 3))
            generation.on_fence(None)

    def _is_drained(self) -> bool:
        generation = self._generation
        if generation.has_exited or generation.reports.is_drained:
            return True
        # A worker whose loop is stuck will not say that it is drained, but its jobs can be looked at.
        return generation.is_silent and not generation.has_living_jobs()

    def tell_drain(self) -> None:
        """Tell the worker until when it may drain and close, as the deadlines stand now."""
        self._tell(self.deadlines)

    def _tell(self, deadlines: Deadlines) -> None:
        self._generation.say(Drain(drain_at=deadlines.drain_at, close_at=deadlines.close_at))

    async def _until_exit(self, deadline: Callable[[], float]) -> bool:
        return await self._generation.changed.until(lambda: self._generation.has_exited, deadline)
