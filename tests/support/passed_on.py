"""Calls of `agents/passes_on.py`, and what their agents and their caller have noted of a handover."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lastcall.supervisor.views import control_socket
from lastcall.worker.base import variables
from lastcall.worker.base.settings import WorkerSettings
from lastcall.worker.local.livekit_server import Dispatched
from lastcall.worker.local.room_server import Visitor
from lastcall.worker.local.rooms import Kind
from tests.support.harness import HERE, Run

AGENT = str(HERE / "agents" / "passes_on.py")
# Seconds; a condition ends each wait.
PATIENCE = 40.0
# A worker may be slow beside other tests: nobody is to give up before it.
# Long frames leave the processor to the others.
PATIENT = {"LASTCALL_HANDOVER__PATIENCE": "30", "LASTCALL_STALL__MISSES": "30", "FRAME": "0.1"}
ENDS = ("silent", "disconnected", "ended")


class PassedCall:
    """A caller, and the jobs that have had the call: `id` is the first. `server` has the LiveKit server."""

    def __init__(self, server: Run, room: str, caller: Visitor, job: Dispatched) -> None:
        self.server = server
        self.room = room
        self.caller = caller
        self.id = job.job_id

    @property
    def jobs(self) -> list[str]:
        return [e.job_id for e in self.server.events("assigned") if e.detail["room"] == self.room]

    def notes(self, what: str, job: str = "") -> list[dict[str, Any]]:
        jobs = [job] if job else self.jobs
        return [each for each in self.server.notes() if each["job"] in jobs and each["what"] == what]

    def say(self, text: str) -> None:
        """Tell the agents of the room what to do."""
        data = base64.b64encode(text.encode()).decode()
        self.caller.say(do="relay", to=[], what={"do": "data", "data": data, "topic": ""})

    async def note(self, what: str, count: int = 1) -> dict[str, Any]:
        """Return a note of the agents, once there are so many."""
        await self.server.until(lambda: len(self.notes(what)) >= count, PATIENCE)
        return self.notes(what)[count - 1]

    async def is_heard(self, identity: str) -> None:
        """Wait until the caller hears this agent and no other."""
        for _ in range(2):
            since = len(self.caller.heard)
            await self.server.until(lambda since=since: identity in self.voices(since)[4:], PATIENCE)  # type: ignore[misc]
        assert set(self.voices(since)[-4:]) == {identity}

    def voices(self, since: int = 0) -> list[str]:
        """Return the identity of each frame that the caller has heard, in turn, from a message on."""
        return [
            each["from"]
            for each in itertools.islice(self.caller.heard, since, None)
            if each["on"] == "relay" and each["what"].get("do") == "tick"
        ]

    @property
    def agent(self) -> str:
        """The identity of the only agent in the room."""
        room = self.server.livekit.rooms.state.get(self.room)
        assert room is not None
        (agent,) = (each.identity for each in room.participants.values() if each.kind == Kind.AGENT)
        return agent

    def room_has(self, identity: str) -> bool:
        room = self.server.livekit.rooms.state.get(self.room)
        return room is not None and identity in room.participants

    def spans(self) -> list[tuple[float, float, str]]:
        """Return when which job spoke, by the notes of the agents: begin, end, job."""
        spans = []
        notes = self.server.notes()
        for job in self.jobs:
            begun: float | None = None
            for each in notes:
                if each["job"] != job:
                    continue
                if each["what"] == "speaks" and begun is None:
                    begun = each["at"]
                elif each["what"] in ENDS and begun is not None:
                    spans.append((begun, each["at"], job))
                    begun = None
            if begun is not None:
                spans.append((begun, self._lost_at(job), job))
        return sorted(spans)

    def _lost_at(self, job: str) -> float:
        """Return when the server lost the connection of an agent, which was killed and has noted no end."""
        connected = self.notes("connected", job)
        events = self.server.events("ghost")
        return next(
            (
                each.at
                for each in events
                if each.detail == {"room": self.room, "identity": connected[0]["identity"]}
            ),
            float("inf"),
        )

    def never_two(self) -> None:
        """Assert that no two agents spoke at a time."""
        for (_, end, old), (begin, _, new) in itertools.pairwise(self.spans()):
            assert old == new or end <= begin, (self.spans(), self.server.notes())

    def longest_silence(self, since: float) -> float:
        """Return the seconds of the longest time in which no agent spoke, from a moment on."""
        pauses = [
            begin - max(end, since)
            for (_, end, _), (begin, _, _) in itertools.pairwise(self.spans())
            if begin > since
        ]
        return max(pauses, default=0.0)


async def begun(server: Run, room: str, *, only: str = "", agent_name: str = "", **spec: Any) -> PassedCall:
    """Return a call whose agent speaks; `only` is the worker that gets it."""
    server.livekit.rooms.open(room)
    caller = server.livekit.rooms.visit(room, "caller")
    metadata = json.dumps(spec)
    job = await server.livekit.dispatch(room, metadata=metadata, only=only, agent_name=agent_name)
    assert job.outcome == "assigned", server.logs()
    call = PassedCall(server, room, caller, job)
    await call.note("speaks")
    await call.is_heard("bot")
    return call


def beside(server: Run) -> dict[str, str]:
    """Return the variables of another supervisor on the server of this run; its jobs write the same notes."""
    rooms = WorkerSettings(local_url=server.livekit.url).to_json()
    return {**server.livekit.environment, variables.REHEARSAL: rooms, "JOB_LOG": str(server.job_log)}


def offer_only(server: Run, workers: dict[str, str]) -> None:
    """Have the jobs of a room offered to one worker alone; `workers` has the ids by room and may change."""
    livekit = server.livekit
    choose = livekit._choose

    def chosen(job: Any, tried: set[str], only: str) -> Any:
        return choose(job, tried, only or workers.get(job.room.name, ""))

    livekit._choose = chosen  # type: ignore[method-assign]


def at_the_answer(call: PassedCall, act: Callable[[], None]) -> None:
    """Act once when an old agent has answered that it is silent, before the answer is delivered."""
    state = call.server.livekit.rooms.state
    relay = state.relay

    def watched(sid: str, to: Iterable[str], message: dict[str, Any]) -> Any:
        found = state.by_session(sid)
        is_here = found is not None and found[0].info.name == call.room
        if is_here and message.get("do") == "answer" and '"took"' in message.get("payload", ""):
            state.relay = relay  # type: ignore[method-assign]
            act()
        return relay(sid, to, message)

    state.relay = watched  # type: ignore[method-assign]


def hand_over(r: Run, job: str) -> dict[str, Any]:
    """Ask a supervisor to hand a job over."""
    answer: dict[str, Any] = control_socket.ask(r.control, "handover", job=job)
    return answer


async def over(r: Run, operation: dict[str, Any]) -> dict[str, Any]:
    """Return an operation once it is over."""
    answer: dict[str, Any] = {}

    def is_over() -> bool:
        answer.update(control_socket.ask(r.control, "operation", id=operation["id"]))
        return bool(answer["state"] != "running")

    await r.until(is_over, PATIENCE * 2)
    return answer


def permit_takeover(call: PassedCall) -> None:
    """Let the successor of a call go on that `holds` keeps from taking over."""
    _ready(call).touch()


def hold_takeover(call: PassedCall) -> None:
    """Keep the successors to come of a call from taking over."""
    _ready(call).unlink()


def _ready(call: PassedCall) -> Path:
    job_log = call.server.job_log
    return job_log.with_name(f"{job_log.name}.ready-{call.room}")
