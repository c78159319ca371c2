"""Many calls that have to go on elsewhere in one stop, with real workers on the local server."""

from __future__ import annotations

import pytest

from lastcall.supervisor.views import control_socket
from tests.support.harness import StartRun
from tests.support.passed_on import AGENT, PATIENCE, PATIENT, begun, beside, over

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
