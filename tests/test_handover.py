"""Calls that go on in another job, with real workers on the local server.

The agents of the tests note when they speak and when they are silent. The caller hears numbered frames.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from lastcall.supervisor.errors import Refused
from lastcall.supervisor.views import control_socket
from lastcall.worker.job.arriving import TAKEOVER_WITHIN
from lastcall.worker.job.capsule import MAX_BYTES
from lastcall.worker.job.session import VERSION
from lastcall.worker.local.rooms import Kind, Reason
from lastcall.worker.local.twirp import MAX_METADATA
from tests.support.harness import LASTCALL, Run, StartRun
from tests.support.passed_on import (
    AGENT,
    IS_ALONE,
    PATIENCE,
    PATIENT,
    RESUMES,
    PassedCall,
    begun,
    beside,
    hand_over,
    hold_takeover,
    job_of,
    offer_only,
    over,
    permit_takeover,
    strike_at_the_answer,
)

SECRET = "my card is 4111"
ENDED = ("JS_SUCCESS", "JS_FAILED")
PATIENCE_OF_TRY = "LASTCALL_HANDOVER__PATIENCE"


def written(r: Run) -> str:
    """Return everything that the supervisor and its workers have written."""
    files = (r.out, r.err, r.receipt_file)
    return "".join(file.read_text(errors="replace") for file in files if file.exists())


def other_worker(r: Run, call: PassedCall) -> str:
    """Return the id of the worker that has not the call."""
    return next(each.id for each in r.livekit.available() if each.id != r.livekit.jobs[call.id].worker_id)


def padded(**spec: Any) -> dict[str, Any]:
    """Return a spec that is the longest metadata which the server takes."""
    return {**spec, "pad": "x" * (MAX_METADATA - len(json.dumps({**spec, "pad": ""})))}


def as_long_as_allowed(state: dict[str, str]) -> dict[str, str]:
    """Return a state that is the longest capsule, or a byte less."""
    text = json.dumps({**state, "letters": ""}, separators=(",", ":"))
    return {**state, "letters": "ü" * ((MAX_BYTES - len(text)) // 2)}


@pytest.mark.core
async def test_a_call_goes_on_in_another_slot(run: StartRun) -> None:
    """By the verb, with 256 kB of state, then once more by itself, and never two agents speak.

    The identity is the fixed one of `request_fnc` with the epoch. `request_fnc` sees the 512 kB of metadata
    and the attributes of the first dispatch. A room that the leaving agent would delete stays. A state that
    is kept while an older one is read is the one that arrives. No byte of a capsule is in anything written.
    """
    r = await run("run", "-w", "2", "--grace", "60", AGENT, rooms=True, environment=PATIENT)
    await r.ready(2)
    spec, keeps = padded(deletes=True), as_long_as_allowed({"said": SECRET})
    call = await begun(r, "room", **spec)
    call.say("keep: " + json.dumps(keeps))
    await r.until(lambda: job_of(r, call.id)["capsule"]["bytes"] > MAX_BYTES - 2, PATIENCE)
    assert job_of(r, call.id)["capsule"]["lacks"] is None
    verb = [*LASTCALL, "handover", call.id, "--wait", "--control", str(r.control)]
    done = await asyncio.to_thread(subprocess.run, verb, capture_output=True, text=True)
    assert done.returncode == 0, (done, r.logs())
    assert "handover: 1 of 1 done" in done.stdout
    second = await call.note("speaks", 2)
    assert (second["state"], second["turns"]) == (keeps, {"bye": call.id})
    assert (second["epoch"], second["reason"]) == (1, "lastcall handover")
    assert json.loads(second["metadata"]) == spec
    await call.is_heard("bot~1")
    assert call.turns == ["bot", "bot~1"]
    await r.until(lambda: call.notes("stored", call.id), PATIENCE)
    again = await asyncio.to_thread(subprocess.run, verb, capture_output=True, text=True)
    assert again.returncode == 1, again
    assert f"handed over already, to job {call.jobs[1]!r}" in again.stderr and len(call.jobs) == 2
    assert call.caller.is_connected
    call.say("keep while it is read")
    await call.note("keep while it is read")
    call.say("hand over")
    third = await call.note("speaks", 3)
    assert (third["epoch"], third["reason"], third["state"]) == (2, "memory", "newer")
    await call.is_heard("bot~2")
    assert call.turns == ["bot", "bot~1", "bot~2"]
    call.never_two()
    digest = hashlib.sha256(json.dumps(spec).encode()).hexdigest()
    assert [each["digest"] for each in call.notes("asked")] == [digest] * 3
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
    """The verb says why a call is not handed over, and the call goes on: busy, no state, nobody there.

    livekit-agents writes the whole job of an assignment that comes too late into the log, from some version
    after 1.3.12 on. No byte of the capsule is there.
    """
    environment = {
        "LASTCALL_HANDOVER__PATIENCE": "1",
        "LASTCALL_HANDOVER__WAIT": "0.3",
        "LASTCALL_STALL__MISSES": "30",
        "LIVEKIT_LOG_LEVEL": "debug",
    }
    r = await run("run", "--grace", "60", AGENT, rooms=True, environment=environment)
    await r.ready()
    call = await begun(r, "room")
    with pytest.raises(Refused, match="no job 'AJ_no'"):
        hand_over(r, "AJ_no")
    call.say("busy")
    await call.note("busy")
    answer = await over(r, hand_over(r, call.id))
    assert (answer["state"], answer["reason"]) == ("failed", "not possible: busy for 0.3 s")
    call.say("idle")
    await call.note("idle")

    for count, (state, error) in enumerate((("too large", "TooLarge"), ("no JSON", "NotJson")), 1):
        call.say(state)
        assert (await call.note("refused", count))["error"] == error
    for state, reason in (
        (
            "a function that returns too much",
            "call.keep: the state has more than 262144 bytes of JSON, or contains itself",
        ),
        (
            "a function that returns no JSON",
            "call.keep: the state has a value of type bytes, which JSON has not",
        ),
        ("a function that raises", "the function of call.keep raised KeyError"),
    ):
        call.say(state)
        await call.note(state)
        answer = await over(r, hand_over(r, call.id))
        assert (answer["state"], answer["reason"]) == ("failed", f"not possible: {reason}")
    assert not r.events("dispatch_created")

    call.say("keep: " + json.dumps({"said": SECRET}))
    await call.note("keep")
    r.livekit.hold_assignments = 8  # livekit-agents waits for 7.5 s
    answer = await over(r, hand_over(r, call.id))
    assert (answer["state"], answer["reason"]) == ("failed", "nobody took it")
    control_socket.ask(r.control, "hold")
    await r.until(lambda: not r.livekit.available(), PATIENCE)
    answer = await over(r, hand_over(r, call.id))
    assert (answer["state"], answer["reason"]) == ("failed", "nobody took it")
    assert job_of(r, call.id)["handover"] == "nobody took it"
    room = r.livekit.rooms.state.get("room")
    assert room is not None and len(room.dispatches) == 1, "those of the failed tries are deleted"
    await call.is_heard("bot")
    assert call.turns == ["bot"]
    if VERSION < (1, 5):  # it does not forget an offer whose assignment is late, and says nothing of the job
        await r.until(lambda: len(r.said("received assignment")) == 2, PATIENCE)
    else:
        await r.until(lambda: r.said("received assignment for an unknown job"), PATIENCE)
        assert "lastcall.call" in written(r), "the attributes of that dispatch"
    r.kill()
    call.say("hang up")
    assert await r.exit(PATIENCE) == 0
    job = next(each for each in r.receipt()["jobs"] if each["id"] == call.id)
    assert (job["fate"], job["handover"]) == ("finished", "nobody took it")
    assert SECRET not in written(r)


@pytest.mark.core
async def test_a_successor_that_dies(run: StartRun) -> None:
    """Before it is ready, and with the old agent's answer on the way: the old agent speaks on, or again.

    So it is with a successor that hangs. When that wakes it has no right to speak any more, nor to have the
    old agent removed.
    """
    r = await run("run", "-w", "2", "--grace", "60", AGENT, rooms=True, environment=PATIENT)
    await r.ready(2)
    call = await begun(r, "room", holds=True)
    operation = hand_over(r, call.id)
    first = await call.note("connected", 2)
    assert first["identity"] == "bot~1"
    struck_at = call.strike(first["job"], signal.SIGKILL)
    answer = await over(r, operation)
    assert answer["state"] == "failed" and "left the room" in answer["reason"], answer
    await call.is_heard("bot")
    assert call.turns == ["bot"] and not call.notes("is to be silent")
    await r.until(lambda: call.room_has("bot") and not call.room_has("bot~1"), PATIENCE)
    call.lives_on(struck_at, 0)

    for count, number in ((3, signal.SIGKILL), (4, signal.SIGSTOP)):
        operation = hand_over(r, call.id)
        successor = await call.note("connected", count)
        assert successor["identity"] == f"bot~{count - 1}"
        struck = strike_at_the_answer(call, successor["job"], number)
        permit_takeover(call)
        again = await call.note("speaks", count - 1)
        assert again["again"] and again["job"] == call.id
        answer = await over(r, operation)
        assert (answer["state"], answer["reason"]) == ("failed", "the successor did not speak")
        hold_takeover(call)
        await call.is_heard("bot")
        call.lives_on(struck[0], RESUMES)
    # It asks to have a predecessor removed that has not answered for so long.
    await asyncio.sleep(max(0.0, struck[0] + TAKEOVER_WITHIN - time.monotonic()))
    os.kill(successor["pid"], signal.SIGCONT)
    await r.until(lambda: call.notes("disconnected", successor["job"]), PATIENCE)
    await call.is_heard("bot")
    assert call.turns == ["bot"]

    permit_takeover(call)
    answer = await over(r, hand_over(r, call.id))
    assert answer["state"] == "done", answer
    await call.is_heard("bot~4")
    assert call.turns == ["bot", "bot~4"]
    call.lives_on(struck[0], RESUMES)
    await whose_successors_end(await begun(r, "their code ends", ends=ENDS_OF_CODE))


# By the epoch of a successor.
ENDS_OF_CODE = {"1": "raises before", "2": "raises", "3": "shuts down", "4": "raises later"}


async def whose_successors_end(call: PassedCall) -> None:
    """Have a call be handed over to successors whose own code ends, before the takeover and right after it.

    Each leaves by itself and at once, so that its old agent has not to wait until it has been removed. An
    entrypoint that goes on after `ctx.shutdown()` would be in the room for 15 s. One that raises when its old
    agent has gone hands the call on.
    """
    r = call.server
    for count, end in enumerate(list(ENDS_OF_CODE.values())[:3], 1):
        answer = await over(r, hand_over(r, call.id))
        expected = "left the room" if end == "raises before" else "the successor did not speak"
        assert answer["state"] == "failed" and expected in answer["reason"], (answer, r.logs())
        successor = call.jobs[count]
        await r.until(lambda successor=successor: call.notes("disconnected", successor), PATIENCE)  # type: ignore[misc]
        (left,) = call.notes("disconnected", successor)
        assert left["reason"] == Reason.CLIENT_INITIATED and not call.notes("speaks", successor)
        if end != "raises before":
            (has_call,) = call.notes(end, successor)
            again = call.notes("speaks", call.id)[-1]
            assert call.notes("silent", call.id)[-1]["at"] < has_call["at"] < again["at"], call.spans()
        await call.is_heard("bot")
    assert len(call.notes("speaks", call.id)) == 3 and call.turns == ["bot"]
    answer = await over(r, hand_over(r, call.id))
    assert answer["state"] == "done", answer
    raised = await call.note("raises later")
    await call.is_heard("bot~5")
    last = call.notes("speaks")[-1]
    assert (last["epoch"], last["reason"]) == (5, "the entrypoint raised RuntimeError")
    assert (last["state"], last["turns"]) == ({"job": raised["job"]}, {"bye": raised["job"]})
    await r.until(lambda: call.notes("stored", raised["job"]), PATIENCE)
    with pytest.raises(Refused, match=f"handed over already, to job {last['job']!r}"):
        hand_over(r, raised["job"])
    assert call.turns == ["bot", "bot~4", "bot~5"] and call.agent == "bot~5"
    call.never_two()


async def test_a_successor_whose_worker_stops(run: StartRun) -> None:
    """Before the takeover it can't be handed over, and leaves again. The old agent speaks on.

    Nobody has noticed anything, and the next try finds another worker.
    """
    r = await run("run", "-w", "2", "--grace", "60", AGENT, rooms=True, environment=PATIENT)
    await r.ready(2)
    call = await begun(r, "room", holds=True)
    offered = {"room": other_worker(r, call)}
    offer_only(r, offered)
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
    await call.is_heard("bot")
    assert call.turns == ["bot"] and not call.notes("is to be silent")
    permit_takeover(call)
    offered.clear()  # another job of the same worker will do
    answer = await over(r, hand_over(r, call.id))
    assert answer["state"] == "done", answer
    await call.is_heard("bot~2")
    assert call.turns == ["bot", "bot~2"]
    call.never_two()


async def test_a_worker_that_dies(run: StartRun) -> None:
    """That of the old agent, when a successor is there: it goes on with the state, and is the only one.

    The old agent leaves the room as its worker dies. One that is killed before is shown for 20 s, and the
    successor has it removed as one that hangs.
    """
    r = await run("run", "-w", "2", "--grace", "60", AGENT, rooms=True, environment=PATIENT)
    await r.ready(2)
    call = await begun(r, "room", holds=True)
    old = r.livekit.jobs[call.id].worker_id
    offer_only(r, {"room": other_worker(r, call)})
    hand_over(r, call.id)
    successor = await call.note("connected", 2)
    assert r.livekit.jobs[successor["job"]].worker_id != old
    pids = {worker["worker_id"]: worker["pid"] for worker in control_socket.ask(r.control, "status")["slots"]}
    os.kill(pids[old], signal.SIGKILL)
    await r.until(lambda: r.events("left") or r.events("ghost"), PATIENCE)
    permitted_at = time.monotonic()
    permit_takeover(call)
    speaks = await call.note("speaks", 2)
    assert speaks["turns"] is None, "no answer of the old agent"
    assert speaks["job"] == successor["job"] and speaks["state"] == {"job": call.id}
    await r.until(lambda: not call.room_has("bot"), PATIENCE)
    await call.is_heard("bot~1")
    assert call.turns == ["bot", "bot~1"]
    call.lives_on(permitted_at, IS_ALONE)


async def test_old_agents_that_die(run: StartRun) -> None:
    """Killed before the successor has joined, before the takeover, and after the answer: it goes on.

    It has no state where it has not joined by then, because nobody else has it.
    """
    r = await run("run", "-w", "2", "--grace", "60", AGENT, rooms=True, environment=PATIENT | {"IDLE": "2"})
    await r.ready(2)
    early, late = [await begun(r, room, holds=True) for room in ("early", "late")]
    absent = await begun(r, "absent", holds="join")
    for call in (early, late, absent):
        hand_over(r, call.id)
        await call.note("started" if call is absent else "connected", 2)
    absent.strike(absent.id, signal.SIGKILL)
    await r.until(lambda: not absent.room_has("bot"), PATIENCE)
    permit_takeover(absent)
    at_the_answer = strike_at_the_answer(late, late.id, signal.SIGKILL)
    struck = [early.strike(early.id, signal.SIGKILL)]
    for call in (early, late):
        permit_takeover(call)
        speaks = await call.note("speaks", 2)
        assert speaks["job"] == call.jobs[1] and speaks["state"] == {"job": call.id}
    speaks = await absent.note("speaks", 2)
    assert (speaks["state"], speaks["turns"]) == (None, None) and absent.caller.is_connected
    await absent.is_heard("bot~1")
    assert absent.agent == "bot~1"
    absent.never_two()
    struck += at_the_answer
    for call, at in zip((early, late), struck, strict=True):
        await r.until(lambda call=call: not call.room_has("bot"), PATIENCE)  # type: ignore[misc]
        await call.is_heard("bot~1")
        assert call.turns == ["bot", "bot~1"] and call.agent == "bot~1"
        call.lives_on(at, RESUMES)
    await r.until(lambda: len(r.log("call handed over")) == 3, PATIENCE)
    r.kill()
    for call in (early, late, absent):
        call.say("hang up")
    assert await r.exit(PATIENCE) == 0
    totals = r.receipt()["totals"]
    assert (totals["handed_over"], totals["failed"], totals["finished"]) == (3, 0, 3), r.logs()


@pytest.mark.core
async def test_old_agents_that_hang(run: StartRun) -> None:
    """Each is removed from the room, and its successor speaks; when the old one wakes it does not speak.

    So it is with one whose connection was lost meanwhile. It is not told of its removal, and comes back to
    the room with a token that is still good.
    """
    environment = PATIENT | {"IDLE": "2"}
    r = await run("run", "-w", "2", "--grace", "60", AGENT, rooms=True, environment=environment)
    await r.ready(2)
    calls = [await begun(r, room, holds=True) for room in ("hangs", "is cut off")]
    operations = [hand_over(r, call.id) for call in calls]
    for call in calls:
        await call.note("connected", 2)
        call.strike(call.id, signal.SIGSTOP)
    try:
        cut_off = calls[1]
        r.livekit.rooms.lose(cut_off.room, "bot")
        await r.until(lambda: r.events("ghost"), PATIENCE)
        permitted_at = time.monotonic()
        for call in calls:
            permit_takeover(call)
        for call in calls:
            speaks = await call.note("speaks", 2)
            assert speaks["turns"] is None and speaks["state"] == {"job": call.id}
            await call.is_heard("bot~1")
            call.lives_on(permitted_at, IS_ALONE)
    finally:
        for call in calls:
            os.kill(call.notes("speaks", call.id)[0]["pid"], signal.SIGCONT)
    for call, operation in zip(calls, operations, strict=True):
        answer = await over(r, operation)
        assert answer["state"] == "done", answer
        await r.until(lambda call=call: call.notes("disconnected", call.id), PATIENCE)  # type: ignore[misc]
        await call.is_heard("bot~1")
        assert call.turns == ["bot", "bot~1"] and call.agent == "bot~1"
        assert len(call.notes("speaks", call.id)) == 1
    came = [event for event in r.events("joined") if event.detail["identity"] == "bot"]
    assert [event.detail["room"] for event in came] == ["hangs", "is cut off", "is cut off"]
    r.kill()
    for call in calls:
        call.say("hang up")
    assert await r.exit(PATIENCE) == 0
    assert r.receipt()["totals"]["handed_over"] == 2


async def test_a_key_that_may_not_dispatch(run: StartRun) -> None:
    """One line says so, handover is off, and the call goes on."""
    r = await run("run", "--grace", "60", AGENT, rooms=True, environment=PATIENT)
    await r.ready()
    call = await begun(r, "room")
    r.livekit.may_dispatch = False
    for _ in range(2):
        answer = await over(r, hand_over(r, call.id))
        assert answer["state"] == "failed" and "the key may not dispatch" in answer["reason"] + r.logs()
    assert len(r.log("handover is switched off")) == 1
    assert "401" in control_socket.ask(r.control, "status")["handover_off"]
    await call.is_heard("bot")
    assert call.turns == ["bot"]


async def is_taken_by_a_stranger(call: PassedCall, worker: str) -> None:
    """Have a worker without lastcall take the dispatch, and assert that the call stays where it is."""
    r = call.server
    offer_only(r, {call.room: worker, "other": "nobody"})
    answer = await over(r, hand_over(r, call.id))
    assert answer["state"] == "failed" and "without lastcall" in answer["reason"]
    _, job = call.jobs
    assert r.livekit.jobs[job].worker_id == worker

    def has_ended() -> bool:
        return any(event.job_id == job and event.detail["status"] in ENDED for event in r.events("job"))

    await r.until(has_ended, PATIENCE)
    assert not call.room_has("stranger")
    # One that is not removed leaves by itself, when its worker has let it speak for 15 s; before 1.5.2 at
    # once, when its dispatch is deleted.
    reasons = {Reason.PARTICIPANT_REMOVED} | ({Reason.CLIENT_INITIATED} if VERSION < (1, 5) else set())
    assert {each["reason"] for each in call.notes("disconnected", job)} <= reasons
    await call.is_heard("bot")
    assert call.caller.is_connected and len(call.notes("speaks", call.id)) == 1
    assert not call.notes("is to be silent", call.id)
    room = r.livekit.rooms.state.get(call.room)
    assert room is not None and len(room.dispatches) == 1
    assert "without lastcall" in control_socket.ask(r.control, "status")["handover_off"]


async def beside_a_stranger(run: StartRun, workers: int, check_enabled: float) -> tuple[Run, list[str], str]:
    """Start workers and one without lastcall. Return the run, the ids of the workers, and that of the other.

    `check_enabled`: the seconds after which the server names the agent of a dispatch.
    """
    command, environment = (
        ("run", "--grace", "60", "-w", str(workers), AGENT),
        PATIENT | {PATIENCE_OF_TRY: "10"},
    )
    r = await run(*command, rooms=True, environment=environment)
    await r.ready(workers)
    ids = [each.id for each in r.livekit.available()]
    stranger = PATIENT | beside(r) | {"LOCAL_ROOM": "1", "IDENTITY": "stranger"}
    await run(command=[sys.executable, AGENT, "start"], livekit=False, environment=stranger)
    await r.ready(workers + 1)
    r.livekit.delays = replace(r.livekit.delays, check_enabled=check_enabled)
    return r, ids, next(each.id for each in r.livekit.available() if each.id not in ids)


@pytest.mark.core
async def test_a_worker_without_lastcall_takes_the_dispatch(run: StartRun) -> None:
    """Its agent is removed, the dispatch is deleted, and handover is off with one line of the log.

    So it is in the other worker of that agent name too, from its next beat on, until a reload. Another agent
    of the name stays. The server has not named the agent by then, because its worker has just registered.
    """
    r, ids, worker = await beside_a_stranger(run, 2, 600)
    call, other = [await begun(r, room, only=id) for room, id in zip(("room", "other"), ids, strict=True)]
    innocent = r.livekit.rooms.visit("room", "agent-AJ_innocent", kind=Kind.AGENT)
    innocent.say(do="update", attributes={"lk.agent_name": ""})
    await is_taken_by_a_stranger(call, worker)
    assert len(call.notes("speaks")) == 2 and call.notes("disconnected"), "until then both speak"
    assert innocent.is_connected

    async def is_off() -> bool:
        answer = await over(r, hand_over(r, other.id))
        return "without lastcall" in answer["reason"]

    async with asyncio.timeout(PATIENCE):
        while not await is_off():
            pass
    tries = [event for event in r.events("dispatch_created") if event.detail["room"] == "other"]
    assert len(tries) <= 1, "one try takes longer than a beat"
    assert len(r.log("handover is switched off")) == 1
    control_socket.ask(r.control, "reload")
    assert control_socket.ask(r.control, "status")["handover_off"] is None


async def test_a_worker_without_lastcall_that_the_server_names_at_once(run: StartRun) -> None:
    """Its agent has not joined yet when the dispatch is deleted, and is removed when it does."""
    r, (own,), worker = await beside_a_stranger(run, 1, 0)
    await is_taken_by_a_stranger(await begun(r, "room", only=own), worker)
    assert len(r.log("handover is switched off")) == 1


async def test_an_agent_of_the_same_name_that_knows_nothing_of_handovers(run: StartRun) -> None:
    """It takes the dispatch, and is withdrawn before it joins; the caller hears the old agent alone."""
    environment = PATIENT | {"LASTCALL_HANDOVER__PATIENCE": "10"}
    r = await run("run", "--grace", "60", AGENT, rooms=True, environment=environment)
    await r.ready()
    call = await begun(r, "room")
    shared = environment | beside(r) | {"UNAWARE": "1"}
    other = await run("run", AGENT, livekit=False, environment=shared)
    await r.ready(2)
    offer_only(r, {"room": other_worker(r, call)})
    answer = await over(r, hand_over(r, call.id))
    assert (answer["state"], answer["reason"]) == ("failed", "nobody took it"), (r.logs(), other.logs())
    assert [each["error"] for each in call.notes("raised")] == ["Withdrawn"]
    assert len(call.jobs) == 2 and len(call.notes("speaks")) == 1
    assert "bot~1" not in [event.detail["identity"] for event in r.events("joined")]
    assert "a successor leaves before it joins" in other.out.read_text()
    await call.is_heard("bot")
    assert call.turns == ["bot"] and not r.log("handover is switched off")


async def test_a_stop_hands_over_before_it_cuts(run: StartRun) -> None:
    """Two supervisors on one server: the calls of the one that stops go on in the other.

    One of them does so in the close, because its successor was not ready before. A call that keeps nothing is
    cut. A reload hands calls over at once where that is asked for.
    """
    environment = PATIENT | {"LASTCALL_HANDOVER__WAIT": "0.3"}
    # A successor has 10 s to be ready. The drain has 5 s of grace, and handovers 11 s of the close. Older
    # versions do not wait for an entrypoint that goes on, and their drain has half of grace.
    grace = "24" if VERSION >= (1, 5) else "18"
    r = await run("run", "--grace", grace, AGENT, rooms=True, environment=environment)
    await r.ready()
    calls = [await begun(r, f"room-{n}", keeps=n, holds=n == 1) for n in range(2)]  # a byte
    other_call = await begun(r, "keeps nothing", keeps_nothing=True)
    other = await run(
        *("run", "--grace", "120", AGENT),  # long enough that the end of grace hands nothing over by itself
        livekit=False,
        environment=environment | beside(r),
    )
    await r.ready(2)
    r.kill()
    await r.until(lambda: r.log("slot closing"), PATIENCE)
    assert not calls[1].notes("is to be silent")
    permit_takeover(calls[1])
    assert await r.exit(PATIENCE * 2) == 75
    assert r.fates() == {calls[0].id: "handed_over", calls[1].id: "handed_over", other_call.id: "cut"}
    for call in calls:
        await call.is_heard("bot~1")
        assert call.turns == ["bot", "bot~1"]
        speaks = call.notes("speaks")[1]
        assert (speaks["reason"], speaks["state"]) == ("the end of grace", calls.index(call))
        call.never_two()
    operation = control_socket.ask(other.control, "reload", handover=True)
    for call in calls:
        await call.note("speaks", 3)
        await call.is_heard("bot~2")
        assert call.turns == ["bot", "bot~1", "bot~2"]
        assert call.notes("speaks")[2]["reason"] == "reload"
        call.never_two()
    assert (await over(other, operation))["state"] == "done"
    for call in calls:
        call.say("hang up")
    other.kill()
    assert await other.exit(PATIENCE) == 0
    await r.nothing_left()
