"""The stop of one generation, decided: from what is seen of it, and the time, to the next thing to do.

A generation is stopped because the supervisor stops, or because another has taken its place; both may happen
to the same one, and then the earliest of their deadlines count. `step` decides and does nothing else. The
loop in `stopper` asks it, does what it says, and asks again.
"""

from __future__ import annotations

import enum
from dataclasses import field, replace
from typing import assert_never

from lastcall.supervisor.fleet.states import SlotState as S
from lastcall.worker.base.budget import Deadlines, earliest
from lastcall.worker.base.records import dataclass
from lastcall.worker.base.wire import StopCause


@dataclass(slots=True, kw_only=True, eq=False)
class Ending:
    """Why a generation is stopped, and by when. Its owner may move the deadlines while the stop goes on."""

    reason: str
    deadlines: Deadlines
    cause: StopCause = "stop"


class Action(enum.Enum):
    """The next thing to do in a stop. All but the last two are done at once, and `step` is asked again."""

    ENTER = "enter the state DRAINING"
    SIGTERM = "send the one SIGTERM that an opaque program gets"
    FENCE = "tell the worker to accept nothing more"
    DRAIN = "tell the worker until when it may drain"
    NOTE_FENCED = "note that the fence was acknowledged"
    NOTE_UNFENCED = "note that the fence was not acknowledged in time"
    HURRY = "tell the worker to end the jobs that are left"
    CLOSE = "enter the state CLOSING"
    TERMINATE = "enter the state TERMINATING, and tell the worker to leave"
    KILL = "enter the state KILLING, and kill"
    WAIT = "do nothing before the time named, unless something changes"
    OVER = "nothing is left to do"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The generation as the step finds it.

    `is_connected`: the worker can be told something. `has_jobs` matters for a silent worker only, which can't
    tell any more; for every other one it is true. `fenced_at` and `is_drained` are what the worker has said.
    """

    state: S
    is_opaque: bool = False
    is_connected: bool = True
    has_exited: bool = False
    was_ready: bool = True
    is_silent: bool = False
    has_jobs: bool = True
    fenced_at: float | None = None
    is_drained: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The stop of one generation so far.

    `fence_said_at` is when the worker was told to fence, `drain_said` the deadline it was last told.
    `close_by` and `terminate_by` are the ends of its shares, counted from when each began. `waits_for_jobs`:
    the close is there for the jobs of a stuck worker.
    """

    fence_said_at: float | None = None
    drain_said: float | None = None
    is_fence_settled: bool = False
    is_signalled: bool = False
    is_hurried: bool = False
    is_killed: bool = False
    close_by: float = float("inf")
    waits_for_jobs: bool = False
    terminate_by: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The next action, and the progress once it is done.

    `due_at` is when a WAIT is over; every other action is due at once, so it never delays the loop.
    """

    action: Action
    progress: Progress
    due_at: float = 0.0


@dataclass(slots=True, kw_only=True)
class StopState:
    """Everything that a generation keeps of its stop: why it is stopped, and how far that is."""

    endings: list[Ending] = field(default_factory=list)
    progress: Progress = Progress()
    is_under_way: bool = False

    @property
    def is_asked(self) -> bool:
        return bool(self.endings)

    @property
    def deadlines(self) -> Deadlines:
        """The earliest deadlines of all endings; there must be one."""
        return earliest(ending.deadlines for ending in self.endings)

    @property
    def reason(self) -> str:
        return self.endings[0].reason

    @property
    def cause(self) -> StopCause:
        """The cause of the ending that has the earliest end of the drain."""
        return min(self.endings, key=lambda ending: ending.deadlines.drain_at).cause


def step(seen: Seen, progress: Progress, deadlines: Deadlines, now: float) -> Step:
    """Return what a stop has to do next."""
    if seen.has_exited:
        return Step(action=Action.OVER, progress=progress)
    match seen.state:
        case S.STARTING | S.READY | S.STALLED:
            return Step(action=Action.ENTER, progress=progress)
        case S.DRAINING if seen.is_opaque:
            return _opaque(progress, deadlines, now)
        case S.DRAINING:
            return _tell(seen, progress, deadlines, now) or _drain(seen, progress, deadlines, now)
        case S.CLOSING:
            return _tell(seen, progress, deadlines, now) or _close(seen, progress, deadlines, now)
        case S.TERMINATING:
            return _terminate(progress, deadlines, now)
        case S.KILLING:
            return _kill(progress, deadlines, now)
        case S.STOPPED | S.FAILED | S.BACKOFF | S.QUARANTINED:
            return Step(action=Action.OVER, progress=progress)
        case _:
            assert_never(seen.state)


def _wait(progress: Progress, due_at: float) -> Step:
    return Step(action=Action.WAIT, progress=progress, due_at=due_at)


def _opaque(progress: Progress, deadlines: Deadlines, now: float) -> Step:
    """Give an opaque program everything up to the kill for itself, after one SIGTERM.

    A second SIGTERM makes many programs, livekit-agents' own command line too, drop their calls.
    """
    if not progress.is_signalled:
        return Step(action=Action.SIGTERM, progress=replace(progress, is_signalled=True))
    return _terminate(progress, deadlines, now)


def _tell(seen: Seen, progress: Progress, deadlines: Deadlines, now: float) -> Step | None:
    """Have the worker know that it is to drain, and until when; once more whenever that has changed."""
    if not seen.is_connected:
        return None  # a worker in the first instant of its life: it is told as soon as it can hear
    if progress.fence_said_at is None:
        return Step(action=Action.FENCE, progress=replace(progress, fence_said_at=now))
    is_first = progress.drain_said is None
    has_moved = progress.drain_said != deadlines.drain_at and now < deadlines.drain_at
    if is_first or (has_moved and seen.state is S.DRAINING):
        return Step(action=Action.DRAIN, progress=replace(progress, drain_said=deadlines.drain_at))
    return None


def _drain(seen: Seen, progress: Progress, deadlines: Deadlines, now: float) -> Step:
    if seen.was_ready:
        # A worker that was cut off before the stop was told nothing, and drains by itself.
        is_told = seen.is_connected or progress.fence_said_at is not None
        if is_told and not progress.is_fence_settled:
            settled = replace(progress, is_fence_settled=True)
            if seen.fenced_at is not None:
                return Step(action=Action.NOTE_FENCED, progress=settled)
            if now >= deadlines.fence_at:
                return Step(action=Action.NOTE_UNFENCED, progress=settled)
            return _wait(progress, deadlines.fence_at)
        # A worker whose loop is stuck will not say that it is drained, but its jobs can be looked at.
        is_over = seen.is_drained or (seen.is_silent and not seen.has_jobs)
        if not is_over and now < deadlines.drain_at:
            return _wait(progress, deadlines.drain_at)
        if not seen.is_drained and not progress.is_hurried:
            return Step(action=Action.HURRY, progress=replace(progress, is_hurried=True))
    # A worker that drained early has its close share from now, and not the rest of grace to hang in. The jobs
    # of a stuck worker are not asked to shut down: they have the time in which jobs of others shut down.
    shares = deadlines.shares
    has_something_to_close = seen.was_ready and (not seen.is_silent or seen.has_jobs)
    share = shares.close if has_something_to_close else shares.terminate
    closing = replace(progress, close_by=now + share, waits_for_jobs=seen.is_silent and seen.has_jobs)
    return Step(action=Action.CLOSE, progress=closing)


def _close(seen: Seen, progress: Progress, deadlines: Deadlines, now: float) -> Step:
    due_at = min(progress.close_by, deadlines.close_at)
    jobs_have_ended = progress.waits_for_jobs and seen.is_silent and not seen.has_jobs
    if now < due_at and not jobs_have_ended:
        return _wait(progress, due_at)
    terminate_by = now + deadlines.shares.terminate
    return Step(action=Action.TERMINATE, progress=replace(progress, terminate_by=terminate_by))


def _terminate(progress: Progress, deadlines: Deadlines, now: float) -> Step:
    due_at = min(progress.terminate_by, deadlines.terminate_at)
    if now < due_at:
        return _wait(progress, due_at)
    return Step(action=Action.KILL, progress=replace(progress, is_killed=True))


def _kill(progress: Progress, deadlines: Deadlines, now: float) -> Step:
    if not progress.is_killed:  # killed for another reason, before the stop
        return Step(action=Action.KILL, progress=replace(progress, is_killed=True))
    # The kernel may take seconds: a process with much memory, or in uninterruptible sleep.
    due_at = deadlines.kill_at
    return _wait(progress, due_at) if now < due_at else Step(action=Action.OVER, progress=progress)
