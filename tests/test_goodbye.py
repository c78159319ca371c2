"""Calls that are told of a stop, in real workers. The test is their supervisor, and sets each deadline."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from lastcall.supervisor.processes.worker_channel import Channel
from lastcall.worker.base.budget import Shares, installed_entrypoint_wait
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.settings import WorkerSettings
from lastcall.worker.base.variables import WORKER
from lastcall.worker.base.wire import (
    OF_WORKER,
    Drain,
    Drained,
    Fence,
    Fenced,
    JobCut,
    JobEnded,
    WorkerHears,
    WorkerSays,
)
from tests.support.harness import Run, StartRun, lives
from tests.support.hearing import last_of

pytestmark = pytest.mark.core

AGENT = str(Path(__file__).parent / "agents" / "told.py")
EXAMPLE = Path(__file__).parent.parent / "examples" / "goodbye"
# The example as it is, with a voice for the first call, and with a load with which a worker takes calls.
ALONE = """
import sys
sys.path.insert(0, {directory!r})
import agent
from livekit.agents import DEFAULT_API_CONNECT_OPTIONS, AgentSession, WorkerOptions, get_job_context, tts


class Voice(tts.TTS):
    def __init__(self):
        super().__init__(capabilities=tts.TTSCapabilities(streaming=False), sample_rate=24000, num_channels=1)

    def synthesize(self, text, *, conn_options=DEFAULT_API_CONNECT_OPTIONS):
        agent.logger.info("says", extra={{"reason": text}})
        return Silence(tts=self, input_text=text, conn_options=conn_options)


class Silence(tts.ChunkedStream):
    async def _run(self, output):
        output.initialize(request_id="r", sample_rate=24000, num_channels=1, mime_type="audio/pcm")
        output.push(bytes(4800))
        output.flush()


def session():
    is_first = get_job_context().job.room.name == "room 1"
    return AgentSession(tts=Voice()) if is_first else AgentSession()


agent.AgentSession = session


def no_load():
    return 0.0


def server():
    return WorkerOptions(entrypoint_fnc=agent.entrypoint, load_fnc=no_load, num_idle_processes=1)
"""
# Seconds; a condition ends each wait.
PATIENCE = 60.0
SHARES = Shares(entrypoint_wait=installed_entrypoint_wait())
# The worker, with a socket to the test as its control channel.
START = """
import os, socket, sys
control = socket.socket(socket.AF_UNIX)
control.connect(sys.argv[1])
os.dup2(control.fileno(), 9)
os.execv(sys.executable, [sys.executable, "-P", "-m", "lastcall.worker", sys.argv[2]])
"""


class Acting:
    """The supervisor of one worker: what it was told, and the channel to tell it something."""

    def __init__(self) -> None:
        self.heard: list[WorkerSays] = []
        self.changed = Condition()
        self.channel: Channel[WorkerHears, WorkerSays]

    def hear(self, message: WorkerSays) -> None:
        self.heard.append(message)
        self.changed.notify()

    async def hears(self, kind: type[Any]) -> Any:  # the message of that class; no narrower type fits all
        return await last_of(kind, self.heard, self.changed, patience=PATIENCE)


@asynccontextmanager
async def supervised(run: StartRun, tmp_path: Path, executor: str) -> AsyncIterator[tuple[Run, Acting]]:
    """Start a worker and be its supervisor."""
    path = tmp_path / "s"
    settings = WorkerSettings(grace=600.0, shares=SHARES, control_fd=9)
    acting = Acting()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        command = [sys.executable, "-c", START, str(path), AGENT]
        r = await run(command=command, environment={WORKER: settings.to_json(), "EXECUTOR": executor})
        async with asyncio.timeout(PATIENCE):
            control, _ = await asyncio.get_running_loop().sock_accept(listener)
    acting.channel = await Channel.open(control, OF_WORKER, acting.hear, lambda _: acting.changed.notify())
    try:
        yield r, acting
    finally:
        acting.channel.close()
        await asyncio.sleep(0)


async def begun(r: Run, **spec: Any) -> str:
    await r.until(lambda: bool(r.livekit.available()), PATIENCE)
    result = await r.livekit.dispatch("room", metadata=json.dumps(spec))
    assert result.outcome == "assigned", r.logs()
    started = await r.job_says(result.job_id, "started", PATIENCE)
    assert started["same"] and not started["inert"]
    return result.job_id


async def kill_forkserver(r: Run) -> None:
    """Kill it. A process that is warm takes the next job, and a new forkserver makes the one after that."""
    children = psutil.Process(r.pid).children()
    (server,) = [each for each in children if each.name() == "forkserver"]
    server.kill()
    await r.until(lambda: not lives(server.pid))


def notes(r: Run, job: str, what: str) -> list[dict[str, Any]]:
    return [each for each in r.notes() if (each["job"], each["what"]) == (job, what)]


@pytest.mark.parametrize("executor", ["PROCESS", "THREAD"])
async def test_calls_are_told_of_the_stop(run: StartRun, tmp_path: Path, executor: str) -> None:
    """Each is told once the fence is said, and again when the deadline moves; one has more time, and uses it.

    The loop of one job is stuck, and it hears later. The process of another was made by a new forkserver.
    """
    async with supervised(run, tmp_path, executor) as (r, acting):
        longer, stuck = await begun(r, extend=4), await begun(r, stuck=True)
        await r.job_says(stuck, "stuck", PATIENCE)
        if executor == "PROCESS":
            await kill_forkserver(r)
        others = [await begun(r) for _ in range(2)]
        acting.channel.say(Fence(reason="recycle: older than 5 s", cause="recycle"))
        first = Drain(drain_at=now() + 300, close_at=now() + 330, cause="recycle")
        acting.channel.say(first)
        fenced = await acting.hears(Fenced)
        for job in (longer, *others):
            told = await r.job_says(job, "told", PATIENCE)
            assert (told["reason"], told["deadline"]) == ("recycle", first.drain_at)
            assert told["at"] >= fenced.at and 200 < told["left"] <= 300
            heard = await r.job_says(job, "heard", PATIENCE)
            assert (heard["reason"], heard["deadline"]) == ("recycle", first.drain_at)
        assert not notes(r, stuck, "told")

        drain_at = now() + 10
        acting.channel.say(Drain(drain_at=drain_at, close_at=drain_at + SHARES.close_needed + 3))
        for job in (longer, *others):
            told = await r.job_says(job, "told again", PATIENCE)
            assert (told["reason"], told["deadline"]) == ("stop", drain_at)
        # It asked for 4 s, and the close has 3 s more than it needs.
        extended = await r.job_says(longer, "extended", PATIENCE)
        assert extended["deadline"] == pytest.approx(drain_at + 3)

        r.let_go()
        assert (await r.job_says(stuck, "told", PATIENCE))["deadline"] in (first.drain_at, drain_at)
        await r.until(lambda: r.process.poll() is not None, PATIENCE)
        assert r.process.returncode == 0, r.logs()
        await acting.changed.until(lambda: len(ends(acting)) == 4)
        assert {end.fate for end in ends(acting)} == {"finished"}
        assert not [message for message in acting.heard if isinstance(message, JobCut)]
        order = [type(message) for message in acting.heard if isinstance(message, Drained | JobEnded)]
        assert order == [JobEnded, JobEnded, JobEnded, Drained, JobEnded]
        assert ends(acting)[-1].id == longer
        assert notes(r, longer, "ended")[0]["at"] > drain_at
        assert {len(notes(r, job, "told")) for job in (longer, stuck, *others)} == {1}
        await r.nothing_left()


def ends(acting: Acting) -> list[JobEnded]:
    return [message for message in acting.heard if isinstance(message, JobEnded)]


async def test_the_example(run: StartRun, tmp_path: Path) -> None:
    """A reload and then a stop, each in the middle of a call: the agent takes leave, and no call is cut.

    The second call has no voice, as in the file itself, and ends without an error in the log.
    """
    target = tmp_path / "alone.py"
    target.write_text(ALONE.format(directory=str(EXAMPLE)))
    r: Run = await run("run", "--grace", "50", f"{target}:server", rooms=True)
    await r.ready()
    first = await talking(r, 1)
    r.kill(signal.SIGHUP)
    await r.until(lambda: r.log("reload done"), PATIENCE)
    await r.until(lambda: r.livekit.jobs[first].ended_at is not None, PATIENCE)
    assert said(r, "good-bye") == ["reload"]
    second = await talking(r, 2)
    r.kill()
    assert await r.exit(PATIENCE) == 0
    assert said(r, "the time is limited") == said(r, "good-bye") == ["reload", "stop"]
    receipt = r.receipt()
    assert (receipt["outcome"], receipt["totals"]["cut"], receipt["totals"]["lost"]) == ("clean", 0, 0)
    assert r.fates()[second] == "finished"
    assert " ".join(said(r, "says")).count("Good-bye!") == 1
    assert len(said(r, "without a tts= nothing is said")) == 1
    # livekit-agents 1.3.12 may look at the memory of a process that has just ended.
    errors = [line for line in r.out.read_text().splitlines() if "Traceback" in line]
    assert not [line for line in errors if "_memory_monitor_task" not in line]
    # As the LiveKit server counts each job whose agent leaves its room by itself.
    assert [r.livekit.jobs[job].error for job in (first, second)] == ["agent worker left the room"] * 2
    assert receipt["seconds"] < 40, "each call ended by itself, long before its deadline"
    await r.nothing_left()


async def talking(r: Run, calls: int) -> str:
    """Begin a call, and return its id once so many calls have begun."""
    await r.until(lambda: bool(r.livekit.available()), PATIENCE)
    result = await r.livekit.dispatch(f"room {calls}", caller="caller")
    assert result.outcome == "assigned", r.logs()
    await r.until(lambda: len(said(r, "the call has begun")) == calls, PATIENCE)
    return result.job_id


def said(r: Run, event: str) -> list[str]:
    """Return the reason in each line of the log that jobs have written with this message."""
    return [str(line.get("reason")) for line in r.said(event)]
