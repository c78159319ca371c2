"""Calls that go on in another job while something of the two dies, with real workers on the local server.

The agents note when they speak and when they are silent, with the time of the monotonic clock.
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from lastcall.supervisor.views import control_socket
from lastcall.worker.base import succession
from lastcall.worker.job.leaving import HELLO, TAKEOVER
from tests.support.harness import Run, StartRun
from tests.support.passed_on import (
    AGENT,
    PATIENCE,
    PATIENT,
    RESUMES,
    PassedCall,
    at_the_answer,
    begun,
    beside,
    hand_over,
    offer_only,
    over,
    permit_takeover,
)

KEEPS = {"said": "ü" * 3000, "turns": [1, 2.5, None, {"deep": [True]}]}


async def two_fleets(run: StartRun, **options: Any) -> tuple[Run, Run, str, str]:
    """Return two supervisors on one server, that of the first run, and the ids of their workers."""
    command = ("run", "--grace", "60", AGENT)
    environment = PATIENT | {"IDLE": "2"}
    r = await run(*command, rooms=True, environment=environment)
    await r.ready()
    (first,) = (each.id for each in r.livekit.available())
    other = await run(*command, livekit=False, environment=environment | beside(r))
    await r.ready(2)
    return r, other, first, next(each.id for each in r.livekit.available() if each.id != first)


async def coming(owner: Run, call: PassedCall) -> dict[str, Any]:
    """Have a call be handed over whose successor has its job, and does not join yet; return the operation."""
    operation = hand_over(owner, call.id)
    await call.note("started", 2)
    return operation


async def under_way(r: Run, owner: Run, call: PassedCall) -> tuple[dict[str, Any], dict[str, Any]]:
    """Have a call be handed over; return the operation, and the note of a successor that waits."""
    operation = hand_over(owner, call.id)
    successor = await call.note("connected", 2)
    assert successor["identity"] == "bot~1" and call.room_has("bot")
    return operation, successor


async def test_supervisors_that_die(run: StartRun) -> None:
    """Killed while two calls leave its worker, of which one has been answered, and another arrives there.

    Those that leave go on elsewhere with their state. The one that arrives stays where it is, because a
    worker without a supervisor ends, and its successor withdraws.
    """
    r, other, first, second = await two_fleets(run)
    leaves = await begun(r, "leaves", only=first, holds=True, keeps=KEEPS)
    answered = await begun(r, "answered", only=first, holds=True, keeps=KEEPS)
    arrives = await begun(r, "arrives", only=second, holds=True, keeps=KEEPS)
    offer_only(r, {"leaves": second, "answered": second, "arrives": first})
    for call in (leaves, answered):
        await under_way(r, r, call)
    operation, withdrawn = await under_way(r, other, arrives)

    killed: list[float] = []

    def kill_supervisor() -> None:
        killed.append(time.monotonic())
        r.kill(signal.SIGKILL)

    at_the_answer(answered, kill_supervisor)
    permit_takeover(answered)
    await r.until(lambda: killed, PATIENCE)
    (killed_at,) = killed
    await r.until(lambda: not any(each.id == first for each in r.livekit.available()), PATIENCE)
    # Its worker is told a moment after the server: a takeover that comes before is as good as any.
    await r.until(lambda: not arrives.room_has("bot~1"), PATIENCE)
    for call in (leaves, arrives):
        permit_takeover(call)
    successors = []
    for call in (leaves, answered):
        speaks = await call.note("speaks", 2)
        assert (speaks["state"], speaks["turns"]) == (KEEPS, {"bye": call.id})
        await call.is_heard("bot~1")
        successors.append(speaks["job"])
    answer = await over(other, operation)
    assert answer["state"] == "failed", answer
    await arrives.is_heard("bot")
    for call in (leaves, answered, arrives):
        call.lives_on(killed_at, 0)
    assert len(arrives.spans()) == 1 and not arrives.notes("speaks", withdrawn["job"])

    other.kill()
    for call in (leaves, answered, arrives):
        call.say("hang up")
    assert await other.exit(PATIENCE) == 0
    assert other.fates() == dict.fromkeys((arrives.id, *successors), "finished")
    await other.nothing_left()
    await r.nothing_left(PATIENCE)


async def test_workers_that_die(run: StartRun) -> None:
    """Killed when an old agent that leaves has answered, while another call arrives.

    The first call goes on in its successor, which has the answer. The old agent of the second has never been
    silent. So it is with a successor that has not joined yet. One of an old agent that dies goes on without
    the state, as nobody else has it. The next worker dies when an old agent elsewhere has answered the
    successor that it has: the old one speaks again, although the job of the successor lives a moment longer.
    """
    r, other, first, second = await two_fleets(run)
    leaves = await begun(r, "leaves", only=first, holds=True, keeps=KEEPS)
    arrives = await begun(r, "arrives", only=second, holds=True, keeps=KEEPS)
    stays = await begun(r, "stays", only=second, holds="join", keeps=KEEPS)
    forgets = await begun(r, "forgets", only=first, holds="join", keeps=KEEPS)
    offered = {"leaves": second, "arrives": first, "stays": first, "forgets": second}
    offer_only(r, offered)
    await under_way(r, r, leaves)
    operation, withdrawn = await under_way(r, other, arrives)
    await coming(other, stays)
    await coming(r, forgets)
    killed_at: list[float] = []
    pids = [leaves.notes("speaks")[0]["pid"], withdrawn["pid"]]
    at_the_answer(leaves, lambda: killed_at.append(kill_worker(r, *pids)))
    permit_takeover(leaves)
    assert (await leaves.note("speaks", 2))["state"] == KEEPS
    await leaves.is_heard("bot~1")
    # The server shows a killed successor for longer than it is waited for, so the reason is no certain one.
    answer = await over(other, operation)
    assert answer["state"] == "failed", answer
    await arrives.is_heard("bot")
    for call in (leaves, arrives, stays):
        call.lives_on(killed_at[0], RESUMES)
    assert len(arrives.spans()) == len(stays.spans()) == 1
    permit_takeover(forgets)
    speaks = await forgets.note("speaks", 2)
    assert (speaks["state"], speaks["turns"]) == (None, None) and forgets.caller.is_connected
    await forgets.is_heard("bot~1")
    forgets.never_two()

    late = await begun(r, "late", only=second, holds=True, keeps=KEEPS)
    await r.until(lambda: len(r.livekit.available()) == 2, PATIENCE)
    offered["late"] = next(each.id for each in r.livekit.available() if each.id != second)
    operation, _ = await under_way(r, other, late)
    at_the_answer(late, lambda: killed_at.append(kill_worker(r)))
    permit_takeover(late)
    assert (await late.note("speaks", 2))["again"]
    assert (await over(other, operation))["reason"] == "the successor did not speak"
    await late.is_heard("bot")
    late.lives_on(killed_at[1], RESUMES)

    for supervisor in (r, other):
        supervisor.kill()
    for call in (leaves, arrives, stays, forgets, late):
        call.say("hang up")
    assert await other.exit(PATIENCE) == 0
    served = (arrives.id, stays.id, late.id, leaves.jobs[1], forgets.jobs[1])
    assert other.fates() == dict.fromkeys(served, "finished")
    await r.exit(PATIENCE)
    assert r.receipt()["totals"]["lost"] == 5


def kill_worker(r: Run, *jobs: int) -> float:
    """Kill the worker of a supervisor with job processes of it, and return when.

    A job whose worker has died is ended some milliseconds later, which would be enough to hear an answer.
    """
    (slot,) = control_socket.ask(r.control, "status")["slots"]
    at = time.monotonic()
    for pid in (*jobs, slot["pid"]):
        os.kill(pid, signal.SIGKILL)
    return at


async def test_a_server_that_dies(run: StartRun) -> None:
    """Killed when a successor comes, is there, and when an old agent has answered; everybody reconnects.

    One agent speaks in the end, with the state, whichever of the two it is.
    """
    r = await run(
        *("run", "--grace", "60", AGENT), rooms=True, environment=PATIENT | {"IDLE": "4", "AGENT_NAME": "a"}
    )
    await r.ready()
    early = await begun(r, "early", agent_name="a", holds=True, keeps=KEEPS)
    late = await begun(r, "late", agent_name="a", holds=True, keeps=KEEPS)
    absent = await begun(r, "absent", agent_name="a", holds="join", keeps=KEEPS)
    operations = [(await under_way(r, r, call))[0] for call in (early, late)]
    operations.append(await coming(r, absent))
    killed_at: list[float] = []

    def kill_server() -> None:
        killed_at.append(time.monotonic())
        r.livekit.forget_everything()
        for call in (early, late, absent):
            call.caller = r.livekit.rooms.visit(call.room, "caller")

    at_the_answer(late, kill_server)
    permit_takeover(late)
    await r.until(lambda: killed_at, PATIENCE)
    await r.until(lambda: absent.room_has("bot") and early.room_has("bot"), PATIENCE)
    await r.until(lambda: early.room_has("bot~1"), PATIENCE)
    for call in (early, absent):
        permit_takeover(call)
    for call, operation in zip((early, late, absent), operations, strict=True):
        answer = await over(r, operation)
        new = answer["state"] == "done"
        await call.is_heard("bot~1" if new else "bot")
        await r.until(lambda old=call, new=new: not old.room_has("bot" if new else "bot~1"), PATIENCE)  # type: ignore[misc]
        call.lives_on(killed_at[0], RESUMES)
    r.kill()
    for call in (early, late, absent):
        call.say("hang up")
    assert await r.exit(PATIENCE) == 0, (answer, r.receipt())
    await r.nothing_left()


async def test_a_participant_that_is_no_agent(run: StartRun) -> None:
    """It calls the methods of a handover with the secret, and shows such attributes: nothing happens."""
    r = await run(*("run", "--grace", "60", AGENT), rooms=True, environment=PATIENT)
    await r.ready()
    call = await begun(r, "room", holds=True, keeps=KEEPS)
    operation, successor = await under_way(r, r, call)
    room = r.livekit.rooms.state.get("room")
    assert room is not None
    (dispatch,) = (each for each in room.dispatches.values() if succession.CALL in each.attributes)
    found = succession.taken_from(dict(dispatch.attributes))
    assert found is not None
    stranger = r.livekit.rooms.visit("room", "stranger")
    shown = {**found.shown, succession.SPEAKS: "1"}
    stranger.say(do="update", attributes=shown)
    payload = json.dumps({"epoch": found.epoch, "secret": found.secret, "job": successor["job"]})
    for number, method in enumerate((HELLO, TAKEOVER)):
        what = {"do": "call", "call": f"c{number}", "method": method, "payload": payload, "within": 3}
        stranger.say(do="relay", to=["bot"], what=what)

    def answers() -> list[dict[str, Any]]:
        return [each["what"] for each in stranger.heard if each.get("what", {}).get("do") == "answer"]

    await r.until(lambda: len(answers()) == 2, PATIENCE)
    assert [answer["text"] for answer in answers()] == ["nobody is waited for here"] * 2
    await call.is_heard("bot")
    assert not call.notes("is to be silent")

    permit_takeover(call)
    assert (await over(r, operation))["state"] == "done"
    assert (await call.note("speaks", 2))["state"] == KEEPS
    await call.is_heard("bot~1")
    assert stranger.is_connected
    call.never_two()
    r.kill()
    call.say("hang up")
    assert await r.exit(PATIENCE) == 0
    fates = r.fates()
    assert fates.pop(call.id, "handed_over") == "handed_over", "it may have ended before the stop"
    assert fates == {successor["job"]: "finished"}
    await r.nothing_left()
