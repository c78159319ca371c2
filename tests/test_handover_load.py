"""Many calls that have to go on elsewhere in one stop, with real workers on the local server."""

from __future__ import annotations

import pytest

from lastcall.supervisor.views import control_socket
from lastcall.worker.handovers import GIVEN_BACK
from lastcall.worker.job.session import VERSION
from tests.support.harness import StartRun
from tests.support.passed_on import (
    AGENT,
    PATIENCE,
    PATIENT,
    begun,
    beside,
    hand_over,
    offer_only,
    over,
    permit_takeover,
)

CALLS = 8
# Longer frames than those of other tests leave the processor to the handovers.
ENVIRONMENT = PATIENT | {"LASTCALL_HANDOVER__WAIT": "0.3", "FRAME": "0.2", "IDLE": "2"}


@pytest.mark.timeout(300)
async def test_a_stop_of_many_calls_and_a_reload_of_their_successors(run: StartRun) -> None:
    """The second worker has a quarter as many warm processes, and is replaced in the middle: no call is cut.

    A call that a reload hands over at once is told so. At the end each call has one agent.
    """
    r = await run("run", "--grace", "60", AGENT, rooms=True, environment=ENVIRONMENT)
    await r.ready()
    calls = [await begun(r, f"room-{number}") for number in range(CALLS)]
    other = await run("run", "--grace", "60", AGENT, livekit=False, environment=ENVIRONMENT | beside(r))
    await r.ready(2)
    replaced = r.events("registered")[1].worker_id
    r.kill()
    await r.until(lambda: len(r.log("call handed over")) >= CALLS // 4, PATIENCE)
    operation = control_socket.ask(other.control, "reload", handover=True)
    assert await r.exit(PATIENCE * 2) == 0, r.receipt()
    assert r.fates() == {call.id: "handed_over" for call in calls}
    assert (await over(other, operation))["state"] == "done"
    await r.until(lambda: replaced not in r.livekit.peers, PATIENCE)
    for call in calls:
        await call.is_heard(call.agent)
        call.never_two()
        assert {note["reason"] for note in call.notes("told", call.id)} == {"stop"}
    told = [note for call in calls for job in call.jobs[1:] for note in call.notes("told", job)]
    assert told and {note["reason"] for note in told} == {"handover"}
    other.kill()
    for call in calls:
        call.say("hang up")
    assert await other.exit(PATIENCE) == 0, other.receipt()
    await r.nothing_left()


async def test_a_stop_of_a_worker_in_which_successors_arrive(run: StartRun) -> None:
    """One has joined and its code hangs, another joins later: each leaves, and its call stays where it is.

    The old agent sees the first one leave. The room does not show it the second, which has published nothing,
    so the worker of that one gives the dispatch back. Both tries end long before `patience` is over.
    """
    command = ("run", "--grace", "60", AGENT)
    r = await run(*command, rooms=True, environment=ENVIRONMENT)
    await r.ready()
    calls = [await begun(r, "hangs", holds=True), await begun(r, "is late", holds="join")]
    other = await run(*command, livekit=False, environment=ENVIRONMENT | beside(r))
    await r.ready(2)
    (worker,) = r.livekit.peers.keys() - {r.livekit.jobs[calls[0].id].worker_id}
    # The old one says again and again that it is available.
    offer_only(r, {call.room: worker for call in calls})
    operations = [hand_over(r, call.id) for call in calls]
    for call, what in zip(calls, ("connected", "started"), strict=True):
        await call.note(what, 2)
    other.kill()
    await r.until(lambda: calls[1].notes("told", calls[1].jobs[1]), PATIENCE)
    permit_takeover(calls[1])
    reasons = {"the successor left the room", GIVEN_BACK}  # not "nobody took it", after `patience`
    for call, operation in zip(calls, operations, strict=True):
        answer = await over(r, operation)
        assert answer["state"] == "failed" and answer["reason"] in reasons, answer
        await call.is_heard("bot")
        assert call.agent == "bot" and len(call.spans()) == 1
    assert await other.exit(PATIENCE) == 0, other.receipt()
    assert other.fates() == {call.jobs[1]: "finished" for call in calls}
    ended = {line["job_id"]: line["error"] for line in other.said("lastcall.call: the entrypoint has ended")}
    expected = {calls[0].jobs[1]: "TimeoutError", calls[1].jobs[1]: "Withdrawn"}
    if VERSION < (1, 5):  # it does not wait for an entrypoint that goes on
        del expected[calls[0].jobs[1]]
    assert ended == expected
    await other.nothing_left()
    r.kill()
    for call in calls:
        call.say("hang up")
    assert await r.exit(PATIENCE) == 0, r.receipt()
    await r.nothing_left()
