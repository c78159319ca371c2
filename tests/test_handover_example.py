"""The examples of agents whose calls go on, with real workers on the local server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lastcall.supervisor.views import control_socket
from lastcall.worker.job.session import NEEDED, VERSION
from lastcall.worker.local.room_server import Visitor
from tests.support.harness import Run, StartRun
from tests.support.talk import read_by, type_to_agents

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(VERSION < NEEDED, reason="resume_session is for livekit-agents 1.5 and newer"),
]

ROOT = Path(__file__).parent.parent
# Seconds; a condition ends each wait.
PATIENCE = 60.0
ANSWERS = ["answer 1 to one", "answer 2 to next"]
# A worker may be slow beside other tests: nobody is to give up before it.
PATIENT = {"LASTCALL_HANDOVER__PATIENCE": "30", "LASTCALL_STALL__MISSES": "30"}
# Both examples as they are, with an LLM and a voice, and with a load with which a worker takes calls.
# The metadata is a number for the one that dials.
BOTH = """
import functools
import importlib.util
import sys

sys.path.insert(0, {root!r})

from livekit.agents import WorkerOptions
from tests.support.talk import Parrot, Voice, talking


def load(name):
    spec = importlib.util.spec_from_file_location(name, f"{root}/examples/{{name}}/agent.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.AgentSession = functools.partial(talking, tts=Voice())
    return module


handover, outbound = load("handover"), load("outbound")


async def dial(ctx, number):
    outbound.logger.info("dials", extra={{"reason": number}})


outbound.dial = dial


async def entrypoint(ctx):
    await (outbound if ctx.job.metadata else handover).entrypoint(ctx)


def no_load():
    return 0.0


def server():
    return WorkerOptions(entrypoint_fnc=entrypoint, load_fnc=no_load, num_idle_processes=1)
"""


async def reads(r: Run, visitor: Visitor, text: str) -> str:
    """Wait until an agent has said this to a visitor, and return the agent's identity."""
    await r.until(lambda: text in [said for _, said in read_by(visitor)], PATIENCE)
    return next(agent for agent, said in read_by(visitor) if said == text)


def logged(r: Run, event: str) -> list[str]:
    """Return the reason in each line of the log that jobs have written with this message."""
    return [str(line.get("reason")) for line in r.said(event)]


async def hand_over(r: Run, job: str) -> dict[str, Any]:
    """Hand over a call, and return the operation once it is over."""
    operation: dict[str, Any] = control_socket.ask(r.control, "handover", job=job)

    def is_over() -> bool:
        operation.update(control_socket.ask(r.control, "operation", id=operation["id"]))
        return bool(operation["state"] != "running")

    await r.until(is_over, PATIENCE)
    return operation


async def test_the_examples(run: StartRun, tmp_path: Path) -> None:
    """A conversation goes on in another job, without a second greeting, and nobody is dialled twice."""
    target = tmp_path / "both.py"
    target.write_text(BOTH.format(root=str(ROOT)))
    r = await run("run", "-w", "2", "--grace", "60", f"{target}:server", rooms=True, environment=PATIENT)
    await r.ready(2)
    visitors, jobs = [], []
    for room, metadata in (("in", ""), ("out", "+4930123456")):
        r.livekit.rooms.open(room)
        visitors.append(r.livekit.rooms.visit(room, "caller"))
        result = await r.livekit.dispatch(room, metadata=metadata)
        assert result.outcome == "assigned", r.logs()
        jobs.append(result.job_id)
    inbound, outbound = visitors
    old = [await reads(r, inbound, "Hello, how can I help you?")]
    old.append(await reads(r, outbound, "Hello! This is a reminder of your appointment tomorrow."))
    type_to_agents(inbound, "one")
    assert await reads(r, inbound, "answer 1 to one") == old[0]
    for job in jobs:
        operation = await hand_over(r, job)
        assert operation["state"] == "done", (operation, r.logs())
    new = []
    for visitor, text in ((inbound, "answer 2 to next"), (outbound, "answer 1 to next")):
        type_to_agents(visitor, "next")
        new.append(await reads(r, visitor, text))
        assert visitor.is_connected
    assert not set(old) & set(new)
    assert [said for _, said in read_by(inbound)] == ["Hello, how can I help you?", *ANSWERS]
    assert len(logged(r, "the call goes on")) == 2
    assert logged(r, "dials") == ["+4930123456"]
    r.kill()
    for room, identity in zip(("in", "out"), new, strict=True):
        r.livekit.rooms.remove(room, identity)
    assert await r.exit(PATIENCE) == 0
    assert r.receipt()["totals"]["handed_over"] == 2
    await r.nothing_left()
