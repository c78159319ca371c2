"""Jobs in rooms: what a worker does when the LiveKit server terminates one."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from lastcall.worker.local.livekit_server import Dispatched
from lastcall.worker.local.room_server import Visitor
from tests.support.harness import HERE, Run, StartRun

JOINS = str(HERE / "agents" / "joins.py")


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


@pytest.mark.core
async def test_a_job_has_a_local_room(run: StartRun) -> None:
    """A job under a local server joins, is heard and leaves, with the room that stands in for livekit's."""
    r = await run("run", "--grace", "60", JOINS, rooms=True)
    await r.ready()
    one = await call(r, "r")
    assert (await r.job_says(one.id, "joined"))["caller"] == "caller"
    await one.hears_more()
    one.say("hang up")
    await one.terminated()
    assert r.livekit.jobs[one.id].error == "agent worker left the room"
    await r.job_says(one.id, "closed")
