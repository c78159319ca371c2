"""The steps that follow a termination, as a table; and the jobs that they are taken with."""

from __future__ import annotations

import asyncio
import os
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
from livekit.rtc import EventEmitter

from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.wire import JobCut, JobEnded, JobOver
from lastcall.worker.job import room_watch
from lastcall.worker.jobs import Job, Jobs
from lastcall.worker.presence import AWAY, EVICTED, JOINS, RECONNECTED, STAYS, Presence
from lastcall.worker.terminations import Terminations

T, FINISH = 1000.0, 60.0


def presence(**known: Any) -> Presence:
    return Presence(**known)


@pytest.mark.parametrize(
    ("known", "step"),
    [
        # Nothing is due before the server or the job says something.
        ({}, ("wait", None)),
        ({"joined_at": T - 60}, ("wait", None)),
        # A job that does not join was ended by the owner of the room.
        ({"terminated_at": T}, ("ask", T + JOINS)),
        # A second attempt to join ends the session of the first, and so does a second join.
        ({"joined_at": T, "terminated_at": T}, ("wait", None)),
        ({"joined_at": T + JOINS + 1, "terminated_at": T}, ("wait", None)),
        # Of one in its room the end comes by itself, or a server leaves it there.
        ({"joined_at": T - 60, "terminated_at": T}, ("ask", T + STAYS)),
        # A full reconnect explains a termination, from RECONNECTED before the look on.
        ({"joined_at": T - 60, "terminated_at": T, "reconnected_at": T + 0.15}, ("wait", None)),
        (
            {"joined_at": T - 60, "terminated_at": T, "reconnected_at": T - RECONNECTED + STAYS},
            ("wait", None),
        ),
        (
            {"joined_at": T - 60, "terminated_at": T, "reconnected_at": T - RECONNECTED},
            ("ask", T + STAYS),
        ),
        # A reconnection whose attempt to resume the session has failed takes longer. It is told once.
        (
            {"joined_at": T - 60, "terminated_at": T, "reconnected_at": T - 12, "is_away": True},
            ("ask", T - 12 + AWAY),
        ),
        (
            {"joined_at": T - 60, "terminated_at": T, "reconnected_at": T + 1, "is_away": True},
            ("ask", T + 1 + AWAY),
        ),
        (
            {"joined_at": T - 900, "terminated_at": T, "reconnected_at": T - AWAY, "is_away": True},
            ("ask", T + STAYS),
        ),
        ({"joined_at": T - 60, "reconnected_at": T - 12, "is_away": True}, ("wait", None)),
        # Work after the call has its time, whether or not the server has terminated the job.
        ({"joined_at": T - 60, "left_at": T + 1, "terminated_at": T}, ("kill", T + 1 + FINISH)),
        ({"joined_at": T - 60, "left_at": T}, ("kill", T + FINISH)),
        # So has a job that was asked.
        ({"joined_at": T - 60, "terminated_at": T, "asked_at": T + STAYS}, ("kill", T + STAYS + FINISH)),
    ],
)
def test_the_next_step(known: dict[str, Any], step: tuple[str, float | None]) -> None:
    """Each row is what is known of a job, and the step with its time."""
    assert presence(**known).next_step(T, FINISH) == step


def test_a_room_that_is_joined_again() -> None:
    """A job that leaves its room and comes back has not left it."""
    known = presence()
    for what, at in (("joined", T), ("left", T + 1), ("joined", T + 2)):
        known.take(what, 1, "", at)
    assert known.next_step(T + 3, FINISH) == ("wait", None)


def test_a_long_reconnection() -> None:
    """A termination in the midst of a reconnection ends no job that comes back, and none that has left."""
    for end, step in (("reconnected", ("wait", None)), ("left", ("kill", T + 100 + FINISH))):
        known = presence()
        known.take("joined", 0, "", T - 60)
        known.take("reconnecting", 0, "", T)
        known.terminated_at = T + 16
        assert known.next_step(T + 60, FINISH) == ("ask", T + AWAY)
        known.take(end, 0, "", T + 100)
        assert not known.is_away and known.next_step(T + 101, FINISH) == step


@pytest.mark.parametrize("end", ["joined", "left"])
def test_no_reconnection_outlives_its_room(end: str) -> None:
    """The end of a room, and a join of another, end the reconnection that was under way."""
    known = presence(joined_at=T - 60, reconnected_at=T, is_away=True)
    known.take(end, 0, "", T + 1)
    assert not known.is_away


@pytest.mark.parametrize(
    ("known", "is_so"),
    [
        ({"joined_at": T, "left_at": T + 1, "reason": 5}, True),  # the room is deleted
        ({"joined_at": T, "left_at": T + 1, "reason": 4}, True),  # the agent is removed
        ({"joined_at": T, "left_at": T + 1, "reason": 1}, False),  # it has left by itself
        ({"joined_at": T, "left_at": T + 1, "reason": 2}, False),  # another took its identity
        ({"terminated_at": T, "asked_at": T}, True),
        ({"joined_at": T, "terminated_at": T, "asked_at": T + STAYS}, False),
        ({}, False),
    ],
)
def test_who_ended_it(known: dict[str, Any], is_so: bool) -> None:
    """Only the owner of a room has the fate `ended_by_server`."""
    assert presence(**known).is_ended_by_server is is_so


@pytest.mark.parametrize(
    ("what", "fate"),
    [("talks", "cut"), ("shuts down", "finished"), ("handed over", "finished"), ("joins again", "finished")],
)
async def test_an_agent_whose_identity_another_joins_with(what: str, fate: str) -> None:
    """Its job is cut if it had more to do and its call does not go on, although its process ends well."""
    told: list[Any] = []
    jobs = Jobs(Condition(), told.append)
    executor = SimpleNamespace(pid=None, exitcode=0)
    jobs.launch("j", executor, SimpleNamespace(id="j", room=SimpleNamespace(name="r"), dispatch_id=""))
    (job,) = jobs
    job.pid = os.getppid()
    jobs.in_room("j", "joined", 0, "PA_1 agent")
    jobs.in_room("j", "left", EVICTED, "", lambda _job: what == "shuts down")
    if what == "handed over":
        job.successor = "AJ_2"
    if what == "joins again":
        jobs.in_room("j", "joined", 0, "PA_2 agent")
        jobs.in_room("j", "left", 1, "")
    jobs.over("j", lambda _executor: None)
    jobs.close("j", executor)
    (ended,) = (message for message in told if isinstance(message, JobEnded))
    assert (ended.fate, ended.by_server) == (fate, False)
    is_told_as_over = any(isinstance(message, JobOver) for message in told)
    assert is_told_as_over is (what in ("shuts down", "joins again"))
    assert jobs.cut == (fate == "cut")


async def test_which_jobs_the_steps_are_taken_with() -> None:
    """A job that was asked to end and joins then is cut, and a pid whose process is gone is not killed."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    changed, asked, killed = Condition(), asyncio.Event(), asyncio.Event()
    told: list[Any] = []
    jobs = Jobs(changed, told.append)

    async def ask(job: Job, _end_at: float) -> None:
        assert job.id == "late"
        asked.set()

    def kill(job: Job) -> None:
        assert job.id == "works on"
        killed.set()

    for id, pid in (("gone", gone.pid), ("works on", os.getpid()), ("late", os.getpid())):
        job = SimpleNamespace(id=id, room=SimpleNamespace(name="r"), dispatch_id="")
        jobs.launch(id, SimpleNamespace(pid=pid), job)
    long_ago = now() - FINISH - 1
    for id in ("gone", "works on"):
        jobs.in_room(id, "left", 0, "")
    dead, works_on, late = jobs
    dead.presence.left_at = works_on.presence.left_at = long_ago
    late.presence.terminated_at = now() - JOINS
    terminations = Terminations(
        jobs,
        changed,
        finish=FINISH,
        ask=ask,
        kill=kill,
        is_ending=lambda _job: False,
        is_stopping=lambda: False,
    )
    running = asyncio.create_task(terminations.run())
    async with asyncio.timeout(30):
        await asked.wait()
        await killed.wait()
    assert not late.cut_short
    jobs.in_room("late", "joined", 0, "PA_1 agent")
    assert late.fate == "cut" and not late.is_ended_by_server
    assert [message.id for message in told if isinstance(message, JobCut)] == ["works on", "late"]
    assert not running.done() and not dead.was_killed
    running.cancel()
    await asyncio.wait([running])


@pytest.mark.parametrize("emits", [True, False])
async def test_a_room_that_the_job_leaves(*, emits: bool) -> None:
    """It is told once that a job leaves by itself, also where the room has no event for it."""
    room = LeftRoom(emits)
    told: list[tuple[str, int]] = []
    room_watch.watch(room, lambda what, reason, _agent: told.append((what, reason)))
    for _ in range(2):
        await room.connect()
        await room.disconnect()
        await room.disconnect()
    assert told == [("joined", 0), ("left", room_watch.CLIENT_INITIATED)] * 2


class LeftRoom(EventEmitter[str]):  # type: ignore[misc]  # livekit.rtc is not type-checked
    """As `rtc.Room.disconnect`, whose last look at the state of the connection may keep the event back."""

    def __init__(self, emits: bool) -> None:
        super().__init__()
        self.emits = emits
        self.is_connected = False
        self.local_participant = SimpleNamespace(sid="PA_1", identity="agent")

    async def connect(self) -> None:
        self.is_connected = True

    async def disconnect(self) -> None:
        if self.is_connected and self.emits:
            self.emit("disconnected", room_watch.CLIENT_INITIATED)
        self.is_connected = False
