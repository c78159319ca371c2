"""The steps of one generation's stop: each state, what is seen and the time, and the next thing to do."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from lastcall.supervisor.fleet import stopper
from lastcall.supervisor.fleet.generation import Generation, told_rooms
from lastcall.supervisor.fleet.states import ALIVE, SLOT_TABLE
from lastcall.supervisor.fleet.states import SlotEvent as E
from lastcall.supervisor.fleet.states import SlotState as S
from lastcall.supervisor.fleet.stop_steps import Action as A
from lastcall.supervisor.fleet.stop_steps import Ending, Progress, Seen, Step, StopState, step
from lastcall.supervisor.processes.reaper import ExitStatus
from lastcall.supervisor.receipt import JobEntry
from lastcall.worker.base.budget import Deadlines, Shares, plan
from lastcall.worker.base.clock import now
from lastcall.worker.base.settings import WorkerSettings
from lastcall.worker.base.wire import MAX_LINE_BYTES, NUL, Served, Terminate, encode
from tests.support.generations import generation_in

T0 = 1000.0
DEADLINES = Deadlines(
    fence_at=T0 + 2,
    drain_at=T0 + 70,
    close_at=T0 + 90,
    terminate_at=T0 + 95,
    kill_at=T0 + 100,
    end_at=T0 + 100,
    shares=Shares(fence=2.0, close=20.0, terminate=5.0, kill=5.0),
)
# A worker that was told everything, and one that has fenced, too.
TOLD = Progress(fence_said_at=T0, drain_said=DEADLINES.drain_at)
FENCED = replace(TOLD, is_fence_settled=True)
HURRIED = replace(FENCED, is_hurried=True)
# The close of a stuck worker with jobs.
STUCK = replace(HURRIED, close_by=T0 + 90, waits_for_jobs=True)


def row(
    name: str, state: S, progress: Progress, at: float, action: A, due: float | None = None, **seen: Any
) -> Any:
    return pytest.param(Seen(state=state, **seen), progress, T0 + at, action, due, id=name)


@pytest.mark.parametrize(
    ("seen", "progress", "at", "action", "due"),
    [
        # Before the drain, whatever the worker was doing.
        row("a starting one", S.STARTING, Progress(), 0, A.ENTER, was_ready=False),
        row("a ready one", S.READY, Progress(), 0, A.ENTER),
        row("a stalled one", S.STALLED, Progress(), 0, A.ENTER, is_silent=True),
        row("fenced already by the signal", S.READY, Progress(fence_said_at=T0), 0, A.ENTER),
        row("an opaque one", S.READY, Progress(), 0, A.ENTER, is_opaque=True),
        # Telling.
        row("is told to fence", S.DRAINING, Progress(), 0, A.FENCE),
        row("is told the deadline", S.DRAINING, Progress(fence_said_at=T0), 0, A.DRAIN),
        row("left by itself: told all the same", S.DRAINING, Progress(), 0, A.FENCE, fenced_at=T0 - 9),
        row("an earlier deadline is told", S.DRAINING, replace(FENCED, drain_said=T0 + 99), 9, A.DRAIN),
        row("a later one, after a stall", S.DRAINING, replace(FENCED, drain_said=T0 + 9), 9, A.DRAIN),
        row("told late, when it can hear", S.CLOSING, Progress(close_by=T0 + 5), 1, A.FENCE),
        # Fencing.
        row("waits for the answer", S.DRAINING, TOLD, 0.1, A.WAIT, 2),
        row("the answer comes", S.DRAINING, TOLD, 0.1, A.NOTE_FENCED, fenced_at=T0 + 0.1),
        row("no answer", S.DRAINING, TOLD, 2, A.NOTE_UNFENCED),
        row("a silent one can't answer", S.DRAINING, TOLD, 0.1, A.WAIT, 2, is_silent=True, has_jobs=False),
        row("told, then cut off", S.DRAINING, TOLD, 0.1, A.WAIT, 2, is_connected=False),
        row("told, cut off, no answer", S.DRAINING, TOLD, 2, A.NOTE_UNFENCED, is_connected=False),
        row("told, answered, cut off", S.DRAINING, TOLD, 1, A.NOTE_FENCED, fenced_at=T0, is_connected=False),
        row("cut off before: no fence", S.DRAINING, Progress(), 3, A.WAIT, 70, is_connected=False),
        row("never ready: no fence", S.DRAINING, TOLD, 0.1, A.CLOSE, was_ready=False),
        row("can't hear yet: no fence", S.DRAINING, Progress(), 0, A.CLOSE, was_ready=False,
            is_connected=False),
        # Draining.
        row("jobs run", S.DRAINING, FENCED, 3, A.WAIT, 70),
        row("drained", S.DRAINING, FENCED, 3, A.CLOSE, is_drained=True),
        row("drain is over", S.DRAINING, FENCED, 70, A.HURRY),
        row("and once told so it is closed", S.DRAINING, HURRIED, 70, A.CLOSE),
        row("silent with jobs", S.DRAINING, FENCED, 3, A.WAIT, 70, is_silent=True),
        row("silent without", S.DRAINING, FENCED, 3, A.HURRY, is_silent=True, has_jobs=False),
        row("drained at the very end", S.DRAINING, FENCED, 70, A.CLOSE, is_drained=True),
        # An opaque program: one SIGTERM, then nothing until the kill.
        row("one SIGTERM", S.DRAINING, Progress(), 0, A.SIGTERM, is_opaque=True, is_connected=False),
        row("no second one", S.DRAINING, Progress(is_signalled=True), 1, A.WAIT, 95, is_opaque=True),
        row("the kill", S.DRAINING, Progress(is_signalled=True), 95, A.KILL, is_opaque=True),
        # Closing: its share, or the deadline if that is earlier.
        row("closes in its share", S.CLOSING, replace(HURRIED, close_by=T0 + 23), 4, A.WAIT, 23),
        row("closes by the deadline", S.CLOSING, replace(HURRIED, close_by=T0 + 99), 80, A.WAIT, 90),
        row("the share is over", S.CLOSING, replace(HURRIED, close_by=T0 + 23), 23, A.TERMINATE),
        row("the deadline is over", S.CLOSING, replace(HURRIED, close_by=T0 + 99), 90, A.TERMINATE),
        row("silent with jobs: as the others", S.CLOSING, STUCK,
            71, A.WAIT, 90, is_silent=True),
        row("silent, its last job ends", S.CLOSING, STUCK, 71,
            A.TERMINATE, is_silent=True, has_jobs=False),
        row("silent only since it closes", S.CLOSING, replace(HURRIED, close_by=T0 + 90), 71, A.WAIT, 90,
            is_silent=True, has_jobs=False),
        row("silent without: a moment", S.CLOSING, replace(HURRIED, close_by=T0 + 8), 4, A.WAIT, 8,
            is_silent=True, has_jobs=False),
        # Terminating.
        row("has a moment", S.TERMINATING, replace(HURRIED, terminate_by=T0 + 28), 24, A.WAIT, 28),
        row("the moment is over", S.TERMINATING, replace(HURRIED, terminate_by=T0 + 28), 28, A.KILL),
        row("terminated by the deadline", S.TERMINATING, replace(HURRIED, terminate_by=T0 + 99), 95, A.KILL),
        row("was being taken down", S.TERMINATING, TOLD, 1, A.WAIT, 95, was_ready=False),
        # Killing.
        row("killed before the stop", S.KILLING, Progress(), 0, A.KILL),
        row("the kernel takes its time", S.KILLING, Progress(is_killed=True), 1, A.WAIT, 100),
        row("in vain", S.KILLING, Progress(is_killed=True), 100, A.OVER),
        # Gone.
        # In the order of the enum: a set has another order in each process of pytest-xdist.
        *[row(f"{s.value}: nothing to stop", s, Progress(), 0, A.OVER) for s in S if s not in ALIVE],
        *[row(f"{s.value}: exited", s, TOLD, 1, A.OVER, has_exited=True) for s in S if s in ALIVE],
    ],
)  # fmt: skip
def test_next_step(seen: Seen, progress: Progress, at: float, action: A, due: float | None) -> None:
    """Each state with what matters in it."""
    following = step(seen, progress, DEADLINES, at)
    assert following.action is action
    assert following.due_at == (0.0 if due is None else T0 + due)
    if action is A.WAIT:
        assert following.progress == progress


ENTERS = {A.ENTER: E.FENCE, A.CLOSE: E.CLOSE, A.TERMINATE: E.TERMINATE, A.KILL: E.KILL}


def walk(seen: Seen, deadlines: Any = DEADLINES, progress: Progress = Progress()) -> list[tuple[float, A]]:  # noqa: B008  # frozen
    """Follow the steps with a clock that jumps to each due time, in a world where nothing ever answers."""
    at = T0
    done: list[tuple[float, A]] = []
    while True:
        following: Step = step(seen, progress, deadlines, at)
        if following.action is A.OVER:
            return done
        if following.action is A.WAIT:
            assert following.due_at > at, "a wait that would spin"
            at = following.due_at
            continue
        done.append((at - T0, following.action))
        progress = following.progress
        event = ENTERS.get(following.action)
        if event is not None and not (event is E.KILL and seen.state is S.KILLING):
            seen = replace(seen, state=SLOT_TABLE[seen.state, event])
        assert len(done) < 20, "steps that never end"


def test_worker_that_never_answers() -> None:
    """Every step at its deadline, each once, and no transition that the table does not list."""
    assert walk(Seen(state=S.READY)) == [
        (0, A.ENTER),
        (0, A.FENCE),
        (0, A.DRAIN),
        (2, A.NOTE_UNFENCED),
        (70, A.HURRY),
        (70, A.CLOSE),
        (90, A.TERMINATE),
        (95, A.KILL),
    ]


def test_jobs_of_a_stuck_worker_have_the_time_of_others() -> None:
    """The drain and the close, to the second; without jobs the stuck worker has a moment for each."""
    stuck = Seen(state=S.READY, is_silent=True)
    assert walk(stuck) == walk(Seen(state=S.READY))
    idle = walk(replace(stuck, has_jobs=False))
    assert idle[-3:] == [(2, A.CLOSE), (7, A.TERMINATE), (12, A.KILL)]


def test_opaque_program_that_never_ends() -> None:
    """The program gets one SIGTERM, and the kill when the time for drain, close and terminate is over."""
    seen = Seen(state=S.READY, is_opaque=True, is_connected=False)
    assert walk(seen) == [(0, A.ENTER), (0, A.SIGTERM), (95, A.KILL)]


def test_killed_at_once() -> None:
    """With deadlines that are all over, nothing is waited for, and the kill comes in the same turn."""
    done = walk(Seen(state=S.READY), DEADLINES.killed(T0))
    assert done[-1] == (0, A.KILL) and all(at == 0 for at, _ in done)


@pytest.mark.parametrize("state", sorted(ALIVE, key=str))
@pytest.mark.parametrize("is_opaque", [False, True])
@pytest.mark.parametrize("is_silent", [False, True])
@pytest.mark.parametrize("was_ready", [False, True])
def test_from_every_state_to_the_kill(state: S, is_opaque: bool, is_silent: bool, was_ready: bool) -> None:
    """A generation in any state is killed by the deadline of its stop, by events that the table lists."""
    seen = Seen(state=state, is_opaque=is_opaque, is_silent=is_silent, was_ready=was_ready)
    *_, (at, action) = walk(seen)
    assert action is A.KILL and at <= 95


def test_second_ending_joins_with_the_earlier_deadlines() -> None:
    """The earliest of each deadline holds, whichever ending came first; a hurry of either is felt."""
    stopping = StopState()
    assert not stopping.is_asked
    first = Ending(reason="reload", deadlines=plan(T0, 100.0, Shares()), cause="reload")
    second = Ending(reason="SIGTERM", deadlines=plan(T0 + 10, 50.0, Shares()))
    stopping.endings += [first, second]
    assert stopping.is_asked and stopping.reason == "reload"
    assert stopping.cause == "stop", "of the ending that has the earliest deadline"
    assert stopping.deadlines.drain_at == second.deadlines.drain_at < first.deadlines.drain_at
    first.deadlines = first.deadlines.hurried(T0 + 11)
    assert stopping.deadlines.drain_at == T0 + 11 and stopping.cause == "reload"
    waiting = step(Seen(state=S.DRAINING), FENCED, second.deadlines, T0 + 11)
    assert waiting.action is A.DRAIN, "told that the drain has become shorter"
    assert step(Seen(state=S.DRAINING), FENCED, stopping.deadlines, T0 + 11).action is A.HURRY


def give_child(generation: Generation, send: Callable[[signal.Signals], None] = lambda _number: None) -> Any:
    """Have a program live that the generation has started, and return it."""
    child: Any = SimpleNamespace(pid=None, status=None, send=send)
    launched: Any = SimpleNamespace(child=child)
    generation._launched = launched
    return child


async def test_wait_that_is_over_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline passes between the two looks of one wait, at the predicate and at the time."""
    generation, _log = generation_in(S.READY)
    child = give_child(generation)
    monkeypatch.setattr(generation, "launcher", SimpleNamespace(is_opaque=True))
    killed = []
    monkeypatch.setattr(generation, "_kill_processes", lambda: killed.append(child.__dict__.update(status=1)))
    at = iter([T0] * 4)
    monkeypatch.setattr(stopper, "now", lambda: next(at, T0 + 95))
    async with asyncio.timeout(5):
        await stopper.stop(generation, Ending(reason="test", deadlines=DEADLINES))
    assert killed and generation.state is S.KILLING


async def test_job_that_ends_between_the_termination_and_the_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut: the worker has ended the job because it was told to, and is killed before it tells."""
    generation, _log = generation_in(S.READY)
    child = give_child(generation)
    monkeypatch.setattr(generation, "launcher", SimpleNamespace(is_opaque=False))
    job = JobEntry(id="J", room="", dispatch_id="", slot=0, generation=1, accepted_at=T0, pid=os.getpid())
    generation.shared.ledger.start(job)
    said: list[object] = []

    def say(message: object) -> None:
        said.append(message)
        if message == Terminate():
            job.pid = 0  # no process has this pid

    monkeypatch.setattr(generation, "say", say)

    def kill() -> None:
        generation.note_cut()
        child.status = 9

    monkeypatch.setattr(generation, "_kill_processes", kill)
    monkeypatch.setattr(stopper, "now", lambda: T0 + 200)
    async with asyncio.timeout(5):
        await stopper.stop(generation, Ending(reason="test", deadlines=DEADLINES))
    generation.write_off()
    assert Terminate() in said and job.fate == "cut"


@pytest.mark.parametrize("state", [S.STARTING, S.READY, S.STALLED, S.DRAINING, S.CLOSING])
async def test_worker_that_is_cut_off_is_told_by_a_signal(state: S) -> None:
    """It may not see that its channel is closed: SIGTERM, for itself alone, begins its drain."""
    generation, log = generation_in(state)
    sent: list[signal.Signals] = []
    child = give_child(generation, sent.append)
    launcher: Any = SimpleNamespace(is_opaque=False, settings=WorkerSettings(grace=60.0))
    generation.launcher = launcher
    waiting = asyncio.create_task(generation._see_cut_off(now()))
    await asyncio.sleep(0)
    assert sent == [signal.SIGTERM] and generation.is_cut_off and not waiting.done()
    assert generation.state is (state if state in (S.DRAINING, S.CLOSING) else S.DRAINING)
    assert log.lines[0][0] == "worker is cut off: it drains by itself"
    child.status = ExitStatus(code=0, signal=None)
    generation.changed.notify()
    async with asyncio.timeout(5):
        await waiting
    assert sent == [signal.SIGTERM]


@pytest.mark.parametrize("letter", ["r", "é", "\N{SLEEPING FACE}", "\x01"])
def test_rooms_that_a_worker_is_told_of(letter: str) -> None:
    """However long the names are in JSON, the message is no longer than its reader accepts."""
    name = letter * 1024
    told = told_rooms([(f"{number}{name}", name, name) for number in range(100)])
    assert 2 < len(told) < 100
    assert len(encode(Served(rooms=told))) <= MAX_LINE_BYTES
    assert told[0] == NUL.join([f"0{name}", name, name])
    assert told_rooms([("room", "RM_1", "agent")] * 60) == [NUL.join(["room", "RM_1", "agent"])] * 60


@pytest.mark.parametrize("state", [S.STARTING, S.READY, S.STALLED])
def test_an_end_between_the_decision_and_the_fence(state: S) -> None:
    """A program that has ended well before its stop could fence it has stopped as asked."""
    generation, log = generation_in(state)
    generation.stopping.endings.append(Ending(reason="SIGTERM", deadlines=DEADLINES))
    launcher: Any = SimpleNamespace(is_opaque=False)
    generation.launcher = launcher
    launched: Any = SimpleNamespace(relays=(None, None))
    generation._record_end(launched, ExitStatus(code=0, signal=None), 0)
    assert generation.state is S.STOPPED
    assert [event for event, _ in log.lines] == ["slot draining", "slot stopped"]
