"""Jobs in rooms: what a worker does when the LiveKit server terminates one."""

from __future__ import annotations

import base64
import json
import os
import signal
from typing import Any

import pytest

from lastcall.worker.local.livekit_server import Dispatched
from lastcall.worker.local.room_server import Visitor
from lastcall.worker.local.rooms import Reason
from tests.support.harness import HERE, Run, StartRun

JOINS = str(HERE / "agents" / "joins.py")
# Seconds of work after a call. A worker of livekit-agents alone kills it 10 s after the agent has left.
AFTER = 20


class Call:
    """A caller in a room, and the job of the agent there."""

    def __init__(self, r: Run, caller: Visitor, job: Dispatched) -> None:
        self.r = r
        self.caller = caller
        self.id = job.job_id

    def say(self, text: str) -> None:
        """Tell the agent what to do."""
        data = base64.b64encode(text.encode()).decode()
        what = {"do": "data", "data": data, "topic": ""}
        self.caller.say(do="relay", to=[], what=what)

    async def hears_more(self) -> None:
        """Wait until the caller has heard more of the agent."""
        heard = len(self.ticks)
        await self.r.until(lambda: len(self.ticks) > heard + 5, 20)

    @property
    def ticks(self) -> list[int]:
        """The numbers of all frames of agents that the caller was sent."""
        agents = {each["from"] for each in self.caller.heard if each["on"] == "relay"}
        return [n for agent in agents for n in self.caller.ticks(agent)]

    async def terminated(self) -> None:
        """Wait until the server has terminated the job."""
        await self.r.until(lambda: any(e.job_id == self.id for e in self.r.events("terminated")), 20)


async def call(r: Run, room: str, **spec: Any) -> Call:
    """Have the agent join a room with a caller."""
    r.livekit.rooms.open(room)
    caller = r.livekit.rooms.visit(room, "caller")
    job = await r.livekit.dispatch(room, metadata=json.dumps(spec))
    assert job.outcome == "assigned", r.logs()
    if spec.get("joins", True):
        await r.job_says(job.job_id, "joined", 30)
    return Call(r, caller, job)


@pytest.mark.long
@pytest.mark.core
async def test_a_termination_does_not_end_what_goes_on(run: StartRun) -> None:
    """A full reconnect in a drain cuts no call, and work after a call has the time of the stop.

    Beside them, as the owners of rooms end calls: DeleteRoom, RemoveParticipant, and a job that never joined.
    """
    r = await run("run", "--grace", "120", JOINS, rooms=True, environment={"LASTCALL_JOBS__FINISH": "60"})
    await r.ready()
    reconnecting = await call(r, "reconnecting")
    working = await call(r, "working", after=AFTER)
    deleted = await call(r, "deleted")
    removed = await call(r, "removed")
    waiting = await call(r, "waiting", joins=False)
    await r.job_says(waiting.id, "waits", 30)
    r.kill()
    await r.until(lambda: r.events("full"), 10)
    reconnecting.say("reconnect")
    working.say("hang up")
    await working.terminated()
    r.livekit.delete_room("deleted")
    agent = r.livekit.jobs[removed.id].job.state.participant_identity
    r.livekit.rooms.remove("removed", agent)
    await r.livekit.terminate(waiting.id)
    await r.job_says(working.id, "stored", AFTER + 30)
    # Longer than a worker of livekit-agents alone lets a terminated job go on, with and without callbacks.
    await reconnecting.terminated()
    await reconnecting.hears_more()
    reconnecting.say("hang up")
    assert await r.exit(60) == 0
    assert r.receipt()["outcome"] == "clean"
    assert r.fates() == {
        reconnecting.id: "finished",
        working.id: "finished",
        deleted.id: "ended_by_server",
        removed.id: "ended_by_server",
        waiting.id: "ended_by_server",
    }
    for one in (reconnecting, working, deleted, removed):
        await r.job_says(one.id, "closed")
    # livekit-agents cancels an entrypoint 15 s after its room is gone.
    cancelled = {note["job"] for note in r.notes() if note["what"] == "cancelled"}
    assert not cancelled & {reconnecting.id, working.id}
    await r.nothing_left()


@pytest.mark.long
@pytest.mark.core
async def test_a_job_that_has_to_end_is_cut(run: StartRun) -> None:
    """A termination is obeyed while the agent stays in its room, and work after a call is bounded.

    An agent is cut as well whose identity another participant joins with, and its callbacks run.
    """
    r = await run("run", "--grace", "60", JOINS, rooms=True, environment={"LASTCALL_JOBS__FINISH": "20"})
    await r.ready()
    staying = await call(r, "staying")
    endless = await call(r, "endless", after=600)
    evicted = await call(r, "evicted")
    await r.livekit.terminate(staying.id)
    agent = r.livekit.jobs[evicted.id].job.state.participant_identity
    r.livekit.rooms.visit("evicted", agent)
    endless.say("hang up")
    await r.job_says(endless.id, "callback", 30)
    await r.job_says(staying.id, "closed", 60)
    await r.job_says(evicted.id, "stored", 60)
    await r.until(lambda: len(r.log("job cut")) == 3, 60)
    assert "another participant has joined with its identity" in r.out.read_text() + r.err.read_text()
    r.kill()
    assert await r.exit(60) == 0
    assert r.receipt()["totals"]["cut"] == 3
    assert not [note for note in r.notes() if note["job"] == endless.id and note["what"] == "stored"]
    await r.nothing_left()


@pytest.mark.core
async def test_agents_of_jobs_that_died_and_of_an_outage(run: StartRun) -> None:
    """A job under a local server joins, is heard and leaves, with the room that stands in for livekit's.

    A killed job leaves no silent agent in its room, and a room that is served gets no second agent.
    """
    r = await run("run", "--grace", "60", "--workers", "2", JOINS, rooms=True)
    await r.ready(2)
    one = await call(r, "r")
    assert (await r.job_says(one.id, "joined"))["caller"] == "caller"
    await one.hears_more()
    one.say("hang up")
    await one.terminated()
    assert r.livekit.jobs[one.id].error == "agent worker left the room"
    await r.job_says(one.id, "closed")
    killed = await call(r, "killed")
    served = await call(r, "served")
    os.kill((await r.job_says(killed.id, "joined"))["pid"], signal.SIGKILL)
    # The server itself would show it for 20 s more.
    await r.until(lambda: killed.caller.heard[-1]["on"] == "participant_disconnected", 10)
    assert killed.caller.heard[-1]["reason"] == Reason.PARTICIPANT_REMOVED
    r.livekit.forget_everything()
    await r.job_says(served.id, "reconnected", 30)
    await r.until(lambda: r.livekit.counts["registered"] == 4 and len(r.livekit.available()) == 2, 30)
    # Neither the worker of that agent takes the room, nor the other one.
    for peer in r.livekit.available():
        again = await r.livekit.dispatch("served", only=peer.id)
        assert again.outcome == "terminated", r.logs()
    room = r.livekit.rooms.state.get("served")
    assert room is not None and len(room.participants) == 1
    caller = r.livekit.rooms.visit("served", "caller")
    await r.until(lambda: caller.heard[1:], 20)
    back = Call(r, caller, Dispatched(outcome="assigned", job_id=served.id))
    back.say("hang up")
    await r.job_says(served.id, "ended")
    r.kill()
    assert await r.exit(60) == 0
    assert r.receipt()["totals"]["failed"] == 1 and r.receipt()["totals"]["started"] == 3
