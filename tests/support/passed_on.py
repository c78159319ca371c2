"""Calls of `agents/passes_on.py`, and what their agents and their caller have noted of a handover."""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import signal
import time
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
# Seconds between the voices of two agents where nothing has died. Ours: 30 ms, and more for a busy machine.
PAUSE = 0.5
# Seconds from the death of a party until one agent speaks, and from the takeover on where the old one hangs,
# or is dead and still shown: docs/handover.md.
RESUMES, IS_ALONE = 2.0, 3.5
ENDS = ("silent", "disconnected", "ended")


class PassedCall:
    """A caller, and the jobs that have had the call: `id` is the first. `server` has the LiveKit server."""

    def __init__(self, server: Run, room: str, caller: Visitor, job: Dispatched) -> None:
        self.server = server
        self.room = room
        self.caller = caller
        self.id = job.job_id
        self._struck_at: dict[str, float] = {}

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
    def turns(self) -> list[str]:
        """The identities that the caller has heard, one after the other."""
        return [identity for identity, _ in itertools.groupby(self.voices())]

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

    def strike(self, job: str, number: signal.Signals) -> float:
        """Kill or freeze the process of a job, and return when."""
        (pid,) = {each["pid"] for each in self.notes("connected", job)}
        os.kill(pid, number)
        return self._struck_at.setdefault(job, time.monotonic())

    def spans(self) -> list[tuple[float, float, str]]:
        """Return when which job spoke, by the notes of the agents: begin, end, job.

        A job that was struck speaks no more; the caller hears whether one speaks again that was frozen.
        """
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
                    spans.append((begun, min(each["at"], self._lost_at(job)), job))
                    begun = None
            if begun is not None:
                spans.append((begun, self._lost_at(job), job))
        return sorted(spans)

    def _lost_at(self, job: str) -> float:
        """Return when a job was struck, or left the room, or when the server lost its connection."""
        (connected,) = self.notes("connected", job)
        lost = {"room": self.room, "identity": connected["identity"]}
        events = self.server.events("ghost") + self.server.events("left")
        return min([self._struck_at.get(job, math.inf), *(e.at for e in events if e.detail == lost)])

    def never_two(self) -> None:
        """Assert that no two agents spoke at a time."""
        for (_, end, old), (begin, _, new) in itertools.pairwise(self.spans()):
            assert old == new or end <= begin, (self.spans(), self.server.notes())

    def lives_on(self, since: float, within: float) -> None:
        """Assert that no two agents spoke at a time, and that from `within` seconds on one did all the time.

        A busy machine has so many seconds more as the waits of this process were late in that time.
        """
        assert self.caller.is_connected
        self.never_two()
        spans = self.spans()
        ends = [(end, begin) for (_, end, _), (begin, _, _) in itertools.pairwise(spans) if begin > since]
        assert spans and spans[-1][1] == math.inf, spans
        for end, begin in ends:
            late = sum(seconds for at, seconds in Run.late if max(since, end) <= at <= begin)
            assert begin <= since + within + late or begin - end <= PAUSE + late, (since, late, spans)


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


def job_of(r: Run, id: str) -> dict[str, Any]:
    """Return what the status of a supervisor has of a job."""
    status = control_socket.ask(r.control, "status")
    return next(job for slot in status["slots"] for job in slot["jobs"] if job["id"] == id)


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


def strike_at_the_answer(call: PassedCall, job: str, number: signal.Signals) -> list[float]:
    """Kill or freeze a job then; return a list that gets the time."""
    struck_at: list[float] = []
    at_the_answer(call, lambda: struck_at.append(call.strike(job, number)))
    return struck_at


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
