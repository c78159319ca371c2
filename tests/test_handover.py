"""Calls that go on in another job, with real workers on the local server.

The agents of the tests note when they speak and when they are silent. The caller hears numbered frames.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from livekit.protocol.agent import Job

from lastcall.supervisor.errors import Refused
from lastcall.supervisor.views import control_socket
from lastcall.worker.base import variables
from lastcall.worker.base.settings import WorkerSettings
from lastcall.worker.local.livekit_server import Dispatched
from lastcall.worker.local.room_server import Visitor
from lastcall.worker.local.rooms import Kind
from tests.support.harness import HERE, LASTCALL, Run, StartRun

AGENT = str(HERE / "agents" / "passes_on.py")
# Seconds; a condition ends each wait.
PATIENCE = 40.0
SECRET = "my card is 4111"
# A worker may be slow beside other tests: nobody is to give up before it.
PATIENT = {"LASTCALL_HANDOVER__PATIENCE": "30", "LASTCALL_STALL__MISSES": "30"}


class Call:
    """A caller, and the jobs that have had the call. `id` is the first."""

    def __init__(self, r: Run, room: str, caller: Visitor, job: Dispatched) -> None:
        self.r = r
        self.room = room
        self.caller = caller
        self.id = job.job_id

    @property
    def jobs(self) -> list[str]:
        return [e.job_id for e in self.r.events("assigned") if e.detail["room"] == self.room]

    def notes(self, what: str, job: str = "") -> list[dict[str, Any]]:
        jobs = [job] if job else self.jobs
        return [each for each in self.r.notes() if each["job"] in jobs and each["what"] == what]

    def say(self, text: str, to: str = "") -> None:
        """Tell the agents of the room, or one, what to do."""
        data = base64.b64encode(text.encode()).decode()
        self.caller.say(do="relay", to=[to] if to else [], what={"do": "data", "data": data, "topic": ""})

    async def note(self, what: str, count: int = 1) -> dict[str, Any]:
        await self.r.until(lambda: len(self.notes(what)) >= count, PATIENCE)
        return self.notes(what)[count - 1]

    async def hears_more(self) -> None:
        """Wait until the caller hears one agent, and then assert that it hears no other."""
        before = len(self.voices)
        await self.r.until(lambda: len(self.voices) > before + 10, PATIENCE)
        assert len(set(self.voices[-5:])) == 1

    @property
    def voices(self) -> list[str]:
        """The identity of each frame that the caller has heard, in turn."""
        return [
            each["from"] for each in self.caller.heard
            if each["on"] == "relay" and each["what"].get("do") == "tick"
        ]  # fmt: skip

    @property
    def turns(self) -> list[str]:
        """The identities that the caller has heard, one after the other."""
        heard: list[str] = []
        for identity in self.voices:
            if heard[-1:] != [identity]:
                heard.append(identity)
        return heard

    def room_has(self, identity: str) -> bool:
        room = self.r.livekit.rooms.state.get(self.room)
        return room is not None and identity in room.participants

    def never_two(self) -> None:
        """Assert by the notes of the agents that no two of them spoke at a time."""
        spans: list[tuple[float, float, str]] = []
        for job in self.jobs:
            begun: float | None = None
            for each in self.r.notes():
                if each["job"] != job:
                    continue
                if each["what"] == "speaks":
                    begun = each["at"]
                elif each["what"] in ("silent", "disconnected", "ended") and begun is not None:
                    spans.append((begun, each["at"], job))
                    begun = None
            if begun is not None:
                spans.append((begun, float("inf"), job))
        spans.sort()
        for (_, end, old), (begin, _, new) in itertools.pairwise(spans):
            assert old == new or end <= begin, (spans, self.r.notes())


async def begun(r: Run, room: str = "room", **spec: Any) -> Call:
    r.livekit.rooms.open(room)
    caller = r.livekit.rooms.visit(room, "caller")
    job = await r.livekit.dispatch(room, metadata=json.dumps(spec))
    assert job.outcome == "assigned", r.logs()
    call = Call(r, room, caller, job)
    await call.note("speaks")
    await call.hears_more()
    return call


def local(r: Run) -> dict[str, str]:
    """Return the variables with which the jobs of another supervisor have rooms of this one's server."""
    return {variables.REHEARSAL: WorkerSettings(local_url=r.livekit.url).to_json()}


def hand_over(r: Run, job: str) -> dict[str, Any]:
    answer: dict[str, Any] = control_socket.ask(r.control, "handover", job=job)
    return answer


def at_the_answer(r: Run, act: Callable[[], None]) -> None:
    """Act once when an old agent has answered that it is silent, before the answer is delivered."""
    state = r.livekit.rooms.state
    relay = state.relay

    def watched(sid: str, to: Iterable[str], message: dict[str, Any]) -> Any:
        if message.get("do") == "answer" and '"took"' in message.get("payload", ""):
            state.relay = relay  # type: ignore[method-assign]
            act()
        return relay(sid, to, message)

    state.relay = watched  # type: ignore[method-assign]


def elsewhere(r: Run, worker: str) -> None:
    """Have the server offer every job from now on to another worker than this one."""
    choose = r.livekit._choose
    r.livekit._choose = lambda job, tried, only: choose(job, tried | {worker}, only)  # type: ignore[method-assign]


async def over(r: Run, operation: dict[str, Any]) -> dict[str, Any]:
    """Return an operation once it is over."""
    answer: dict[str, Any] = {}

    def is_over() -> bool:
        answer.update(control_socket.ask(r.control, "operation", id=operation["id"]))
        return bool(answer["state"] != "running")

    await r.until(is_over, PATIENCE * 2)
    return answer


def job_of(r: Run, id: str) -> dict[str, Any]:
    status = control_socket.ask(r.control, "status")
    return next(job for slot in status["slots"] for job in slot["jobs"] if job["id"] == id)


def written(r: Run) -> str:
    """Return everything that the supervisor and its workers have written."""
    files = (r.out, r.err, r.receipt_file)
    return "".join(file.read_text(errors="replace") for file in files if file.exists())


@pytest.mark.core
async def test_a_call_goes_on_in_another_slot(run: StartRun) -> None:
    """By the verb, with its state, then once more by itself, and never two agents speak.

    The identity is that of `request_fnc` with the epoch. Metadata and attributes are those of the first
    dispatch. A room that the leaving agent would delete stays. No byte of the capsule is in anything written.
    """
    r = await run("run", "-w", "2", "--grace", "60", AGENT, rooms=True, environment=PATIENT)
    await r.ready(2)
    spec: dict[str, Any] = {"keeps": {"said": SECRET, "letters": "ü" * 50_000}, "deletes": True}
    call = await begun(r, **spec)
    await r.until(lambda: job_of(r, call.id)["capsule"], PATIENCE)
    capsule = job_of(r, call.id)["capsule"]
    assert capsule["bytes"] > 100_000 and capsule["lacks"] is None
    verb = [*LASTCALL, "handover", call.id, "--wait", "--control", str(r.control)]
    done = await asyncio.to_thread(subprocess.run, verb, capture_output=True, text=True)
    assert done.returncode == 0, (done, r.logs(), r.notes())
    assert "handover: 1 of 1 done" in done.stdout
    second = await call.note("speaks", 2)
    assert (second["state"], second["turns"]) == (spec["keeps"], {"bye": call.id})
    assert (second["epoch"], second["reason"]) == (1, "lastcall handover")
    assert json.loads(second["metadata"]) == spec
    await call.hears_more()
    assert call.turns == ["bot", "bot~1"]
    await r.until(lambda: call.notes("stored", call.id), PATIENCE)
    again = await asyncio.to_thread(subprocess.run, verb, capture_output=True, text=True)
    assert again.returncode == 1, again
    assert f"handed over already, to job {call.jobs[1]!r}" in again.stderr and len(call.jobs) == 2
    assert call.caller.is_connected
    call.say("hand over")
    third = await call.note("speaks", 3)
    assert (third["epoch"], third["reason"]) == (2, "memory")
    await call.hears_more()
    assert call.turns == ["bot", "bot~1", "bot~2"]
    call.never_two()
    for each in (*call.notes("asked"), *call.notes("started")):
        assert each["attributes"] == {}
    assert len(call.jobs) == 3
    r.kill()
    call.say("hang up")
    assert await r.exit(PATIENCE) == 0
    assert r.receipt()["totals"]["handed_over"] == 2
    assert r.fates()[call.jobs[2]] == "finished"
    assert SECRET not in written(r) and "üüü" not in written(r) and "\\u00fc\\u00fc" not in written(r)
    await r.nothing_left()


async def test_what_a_call_lacks(run: StartRun) -> None:
    """The verb says why a call is not handed over, and the call goes on: busy, nobody there, the limit."""
    environment = {"LASTCALL_HANDOVER__PATIENCE": "1", "LASTCALL_HANDOVER__WAIT": "0.3"}
    r = await run("run", "--grace", "60", AGENT, rooms=True, environment=environment)
    await r.ready()
    call = await begun(r)
    with pytest.raises(Refused, match="no job 'AJ_no'"):
        hand_over(r, "AJ_no")
    call.say("busy")
    await call.note("busy")
    answer = await over(r, hand_over(r, call.id))
    assert (answer["state"], answer["reason"]) == ("failed", "not possible: busy for 0.3 s")
    call.say("idle")
    await call.note("idle")
    control_socket.ask(r.control, "hold")
    await r.until(lambda: not r.livekit.available(), PATIENCE)
    answer = await over(r, hand_over(r, call.id))
    assert (answer["state"], answer["reason"]) == ("failed", "nobody took it")
    assert job_of(r, call.id)["handover"] == "nobody took it"
    room = r.livekit.rooms.state.get("room")
    assert room is not None and len(room.dispatches) == 1, "that of the failed try is deleted"
    await call.hears_more()
    assert call.turns == ["bot"] and call.jobs == [call.id]
    r.kill()
    call.say("hang up")
    assert await r.exit(PATIENCE) == 0
    (job,) = r.receipt()["jobs"]
    assert (job["fate"], job["handover"]) == ("finished", "nobody took it")


async def test_a_successor_that_dies(run: StartRun) -> None:
    """Before it is ready, and with the old agent's answer on the way: the old agent speaks on, or again.

    So it is with a successor that hangs. When that wakes it has no right to speak any more.
    """
    r = await run("run", "-w", "2", "--grace", "60", AGENT, rooms=True, environment=PATIENT)
    await r.ready(2)
    call = await begun(r, holds=True)
    ready = r.job_log.with_name(r.job_log.name + ".ready")
    operation = hand_over(r, call.id)
    first = await call.note("connected", 2)
    assert first["identity"] == "bot~1"
    os.kill(first["pid"], signal.SIGKILL)
    answer = await over(r, operation)
    assert answer["state"] == "failed" and "left the room" in answer["reason"], answer
    await call.hears_more()
    assert call.turns == ["bot"] and not call.notes("is to be silent")
    await r.until(lambda: call.room_has("bot") and not call.room_has("bot~1"), PATIENCE)

    for count, number in ((3, signal.SIGKILL), (4, signal.SIGSTOP)):
        operation = hand_over(r, call.id)
        successor = await call.note("connected", count)
        assert successor["identity"] == f"bot~{count - 1}"
        at_the_answer(r, lambda pid=successor["pid"], number=number: os.kill(pid, number))  # type: ignore[misc]
        ready.touch()
        again = await call.note("speaks", count - 1)
        assert again["again"] and again["job"] == call.id
        answer = await over(r, operation)
        assert (answer["state"], answer["reason"]) == ("failed", "the successor did not speak")
        ready.unlink()
        await call.hears_more()
    os.kill(successor["pid"], signal.SIGCONT)
    await r.until(lambda: call.notes("disconnected", successor["job"]), PATIENCE)
    await call.hears_more()
    assert call.turns == ["bot"]
    call.never_two()

    ready.touch()
    answer = await over(r, hand_over(r, call.id))
    assert answer["state"] == "done", answer
    await call.hears_more()
    assert call.turns == ["bot", "bot~4"]
    call.never_two()


async def test_a_successor_whose_worker_stops(run: StartRun) -> None:
    """Before the takeover it can't be handed over, and leaves again. The old agent speaks on.

    Nobody has noticed anything, and the next try finds another worker.
    """
    r = await run("run", "-w", "2", "--grace", "60", AGENT, rooms=True, environment=PATIENT)
    await r.ready(2)
    call = await begun(r, holds=True)
    elsewhere(r, r.livekit.jobs[call.id].worker_id)
    operation = hand_over(r, call.id)
    successor = (await call.note("connected", 2))["job"]
    await r.until(lambda: job_of(r, successor)["capsule"], PATIENCE)
    assert job_of(r, successor)["capsule"]["lacks"] == "the agent has not the call yet"
    answer = await over(r, hand_over(r, successor))
    assert answer["reason"] == "not possible: the agent has not the call yet"
    worker = r.livekit.jobs[successor].worker_id
    slots = control_socket.ask(r.control, "status")["slots"]
    os.kill(next(each["pid"] for each in slots if each["worker_id"] == worker), signal.SIGTERM)
    await r.until(lambda: call.notes("disconnected", successor), PATIENCE)
    answer = await over(r, operation)
    assert answer["state"] == "failed" and "left the room" in answer["reason"], answer
    await call.hears_more()
    assert call.turns == ["bot"] and not call.notes("is to be silent")
    r.job_log.with_name(r.job_log.name + ".ready").touch()
    del r.livekit._choose  # another job of the same worker will do
    answer = await over(r, hand_over(r, call.id))
    assert answer["state"] == "done", answer
    await call.hears_more()
    assert call.turns == ["bot", "bot~2"]
    call.never_two()


async def test_a_worker_that_dies(run: StartRun) -> None:
    """That of the old agent, when a successor is there: it goes on with the state, and is the only one."""
    r = await run("run", "-w", "2", "--grace", "60", AGENT, rooms=True, environment=PATIENT)
    await r.ready(2)
    call = await begun(r, holds=True)
    old = r.livekit.jobs[call.id].worker_id
    elsewhere(r, old)
    hand_over(r, call.id)
    successor = await call.note("connected", 2)
    assert r.livekit.jobs[successor["job"]].worker_id != old
    pids = {worker["worker_id"]: worker["pid"] for worker in control_socket.ask(r.control, "status")["slots"]}
    os.kill(pids[old], signal.SIGKILL)
    r.job_log.with_name(r.job_log.name + ".ready").touch()
    speaks = await call.note("speaks", 2)
    assert speaks["job"] == successor["job"] and speaks["state"] == {"job": call.id}
    await r.until(lambda: not call.room_has("bot"), PATIENCE)
    await call.hears_more()
    assert call.turns == ["bot", "bot~1"]


async def test_an_old_agent_that_dies_after_its_answer(run: StartRun) -> None:
    """Nobody can take the voice back then: the successor is not removed, and goes on."""
    r = await run("run", "-w", "2", "--grace", "60", AGENT, rooms=True, environment=PATIENT)
    await r.ready(2)
    call = await begun(r, holds=True)
    pid = call.notes("speaks")[0]["pid"]
    hand_over(r, call.id)
    successor = await call.note("connected", 2)
    at_the_answer(r, lambda: os.kill(pid, signal.SIGKILL))
    r.job_log.with_name(r.job_log.name + ".ready").touch()
    speaks = await call.note("speaks", 2)
    assert speaks["job"] == successor["job"] and speaks["state"] == {"job": call.id}
    await r.until(lambda: not call.room_has("bot"), PATIENCE)
    await call.hears_more()
    assert call.turns == ["bot", "bot~1"] and call.room_has("bot~1")


async def test_an_old_agent_that_hangs(run: StartRun) -> None:
    """It is removed from the room, and the successor speaks; when it wakes it does not speak."""
    r = await run("run", "-w", "2", "--grace", "60", AGENT, rooms=True, environment=PATIENT)
    await r.ready(2)
    call = await begun(r, holds=True)
    operation = hand_over(r, call.id)
    await call.note("connected", 2)
    pid = call.notes("speaks")[0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        r.job_log.with_name(r.job_log.name + ".ready").touch()
        speaks = await call.note("speaks", 2)
        assert speaks["turns"] is None and speaks["state"] == {"job": call.id}
        await call.hears_more()
    finally:
        os.kill(pid, signal.SIGCONT)
    answer = await over(r, operation)
    assert answer["state"] == "done", answer
    await call.hears_more()
    assert call.turns == ["bot", "bot~1"] and not call.room_has("bot")
    r.kill()
    call.say("hang up")
    assert await r.exit(PATIENCE) == 0
    assert r.receipt()["totals"]["handed_over"] == 1


async def test_a_key_that_may_not_dispatch(run: StartRun) -> None:
    """One line says so, handover is off, and the call goes on."""
    r = await run("run", "--grace", "60", AGENT, rooms=True, environment=PATIENT)
    await r.ready()
    call = await begun(r)
    r.livekit.may_dispatch = False
    for _ in range(2):
        answer = await over(r, hand_over(r, call.id))
        assert answer["state"] == "failed" and "the key may not dispatch" in answer["reason"] + r.logs()
    assert len(r.log("handover is switched off")) == 1
    assert "401" in control_socket.ask(r.control, "status")["handover_off"]
    await call.hears_more()
    assert call.turns == ["bot"]


async def test_a_worker_without_lastcall_takes_the_dispatch(run: StartRun) -> None:
    """Its agent is removed, the dispatch is deleted, and handover is off with one line of the log.

    So it is in the other worker of that agent name too, until a reload. Another agent of the name stays.
    """
    environment = PATIENT | {"LASTCALL_HANDOVER__PATIENCE": "10"}
    r = await run("run", "-w", "2", "--grace", "60", AGENT, rooms=True, environment=environment)
    await r.ready(2)
    call = await begun(r)
    elsewhere(r, r.livekit.jobs[call.id].worker_id)
    other = await begun(r, "other")
    innocent = r.livekit.rooms.visit("room", "agent-AJ_innocent", kind=Kind.AGENT)
    control_socket.ask(r.control, "hold")
    await r.until(lambda: not r.livekit.available(), PATIENCE)
    operation = hand_over(r, call.id)
    await r.until(lambda: r.events("dispatch_no_worker"), PATIENCE)
    room = r.livekit.rooms.state.get("room")
    assert room is not None
    stranger = r.livekit.rooms.visit("room", "agent-AJ_stock", kind=Kind.AGENT)
    taken = Job(id="AJ_stock", dispatch_id=list(room.dispatches)[-1])
    taken.state.participant_identity = "agent-AJ_stock"
    r.livekit.rooms.state.link("room", room.info.sid, taken)
    await r.until(lambda: not stranger.is_connected, PATIENCE)
    answer = await over(r, operation)
    assert answer["state"] == "failed" and "without lastcall" in answer["reason"]
    await call.hears_more()
    assert call.turns == ["bot"] and innocent.is_connected
    assert len(room.dispatches) == 1
    assert "without lastcall" in control_socket.ask(r.control, "status")["handover_off"]

    async def is_off() -> bool:
        answer = await over(r, hand_over(r, other.id))
        return "without lastcall" in answer["reason"]

    async with asyncio.timeout(PATIENCE):
        while not await is_off():
            pass
    dispatched = len(r.events("dispatch_no_worker"))
    assert await is_off() and len(r.events("dispatch_no_worker")) == dispatched
    assert len(r.log("handover is switched off")) == 1
    control_socket.ask(r.control, "reload")
    assert control_socket.ask(r.control, "status")["handover_off"] is None


async def test_an_agent_of_the_same_name_that_knows_nothing_of_handovers(run: StartRun) -> None:
    """It takes the dispatch, and is withdrawn before it joins; the caller hears the old agent alone."""
    environment = PATIENT | {"LASTCALL_HANDOVER__PATIENCE": "10"}
    r = await run("run", "--grace", "60", AGENT, rooms=True, environment=environment)
    await r.ready()
    call = await begun(r)
    shared = environment | r.livekit.environment | local(r) | {"JOB_LOG": str(r.job_log), "UNAWARE": "1"}
    other = await run("run", AGENT, livekit=False, environment=shared)
    await r.ready(2)
    elsewhere(r, r.livekit.jobs[call.id].worker_id)
    answer = await over(r, hand_over(r, call.id))
    assert (answer["state"], answer["reason"]) == ("failed", "nobody took it"), (r.logs(), other.logs())
    assert [each["error"] for each in call.notes("raised")] == ["Withdrawn"]
    assert len(call.jobs) == 2 and len(call.notes("speaks")) == 1
    assert "bot~1" not in [event.detail["identity"] for event in r.events("joined")]
    assert "a successor leaves before it joins" in other.out.read_text()
    await call.hears_more()
    assert call.turns == ["bot"] and not r.log("handover is switched off")


async def test_a_stop_hands_over_before_it_cuts(run: StartRun) -> None:
    """Two supervisors on one server: the calls of the one that stops go on in the other.

    A call that keeps nothing is cut. A reload hands calls over at once where that is asked for.
    """
    environment = PATIENT | {"LASTCALL_HANDOVER__WAIT": "0.3"}
    r = await run("run", "--grace", "30", AGENT, rooms=True, environment=environment)
    await r.ready()
    calls = [await begun(r, f"room-{n}") for n in range(2)]
    other_call = await begun(r, "keeps nothing", keeps_nothing=True)
    other = await run(
        *("run", "--grace", "120", AGENT),  # long enough that the end of grace hands nothing over by itself
        livekit=False,
        environment=environment | r.livekit.environment | local(r) | {"JOB_LOG": str(r.job_log)},
    )
    await r.ready(2)
    r.kill()
    assert await r.exit(PATIENCE * 2) == 75
    assert r.fates() == {calls[0].id: "handed_over", calls[1].id: "handed_over", other_call.id: "cut"}
    for call in calls:
        await call.hears_more()
        assert call.turns == ["bot", "bot~1"]
        assert call.notes("speaks")[1]["reason"] == "the end of grace"
        call.never_two()
    operation = control_socket.ask(other.control, "reload", handover=True)
    for call in calls:
        await call.note("speaks", 3)
        await call.hears_more()
        assert call.turns == ["bot", "bot~1", "bot~2"]
        assert call.notes("speaks")[2]["reason"] == "reload"
        call.never_two()
    assert (await over(other, operation))["state"] == "done"
    for call in calls:
        call.say("hang up")
    other.kill()
    assert await other.exit(PATIENCE) == 0
    await r.nothing_left()
