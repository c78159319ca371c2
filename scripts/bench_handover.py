"""The figures of a call that goes on in another job, and of calls that are told of a stop.

`scripts/bench handover [--runs N] [--write]`. Two supervisors on one local server pass a call to and fro. The
server notes each frame of audio as it hands the frame to the caller. The agents note when they speak, on the
same clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from lastcall.supervisor.views.control_socket import ask
from lastcall.worker.base import variables
from lastcall.worker.base.settings import WorkerSettings
from lastcall.worker.call_channels import Calls
from lastcall.worker.job.call import Call
from lastcall.worker.local.livekit_server import DispatchServer, Event
from lastcall.worker.local.rooms import Kind
from scripts.bench import machine, start, summary, supervised, until
from scripts.pages import write_section

ROOT = Path(__file__).parent.parent
AGENT = str(ROOT / "tests" / "agents" / "passes_on.py")
TOLD = str(ROOT / "tests" / "agents" / "told.py")
# Seconds of a frame of the agent's, as `tests/agents/passes_on.py` speaks.
FRAME = 0.02
# Bytes of a capsule that is ready: that of a call of ten minutes.
READY_BYTES = 22_000
JOBS = 50
# Processes that wait for a job beside these, and seconds until a tree that is all started is at rest.
IDLE, SETTLED_AFTER = 2, 3.0
# Settings under which no handover gives up because the machine is busy.
PATIENT = "[handover]\npatience = 30\nlimit = 1000\n[stall]\nmisses = 60\n"


class Watch:
    """Notes each frame that a room of the local server hears, and the moments without an agent."""

    def __init__(self) -> None:
        self.frames: list[tuple[float, str]] = []
        self.without_agent = 0
        self._has_begun = False
        self._server: DispatchServer | None = None

    def attach(self, server: DispatchServer) -> None:
        """Note every frame that is handed to a caller."""
        self._server = server
        state = server.rooms.state
        tick = state.tick

        def heard(sid: str, track_sid: str, message: dict[str, Any]) -> Any:
            found = state.by_session(sid)
            if found is not None:
                self.frames.append((time.monotonic(), found[1].identity))
            return tick(sid, track_sid, message)

        state.tick = heard  # type: ignore[method-assign]

    def look(self, _event: Event) -> None:
        """Count the moments at which a caller is in a room that no agent is in any more."""
        if self._server is None:
            return
        for room in self._server.rooms.state:
            agents = sum(each.kind == Kind.AGENT for each in room.participants.values())
            self._has_begun = self._has_begun or agents > 0
            self.without_agent += self._has_begun and not agents


class Side:
    """One supervisor. `peer` is its worker at the server, and `jobs` counts those that it has been given."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path, peer: str) -> None:
        self.process = process
        self.directory = directory
        self.peer = peer
        self.jobs = 0
        self.is_held = False
        self._read = 0
        self._text = ""

    @property
    def log(self) -> str:
        with open(self.directory / "log", errors="replace") as file:
            file.seek(self._read)
            self._text += file.read()
            self._read = file.tell()
        return self._text

    def events(self, event: str) -> int:
        return self.log.count(f'"event": "{event}"')

    @property
    def warmed(self) -> int:
        """How many processes have become ready for a job."""
        return self.log.count('"process initialized"')

    async def ask(self, verb: str, **arguments: Any) -> Any:
        return await asyncio.to_thread(ask, self.directory / "c", verb, **arguments)

    async def hold(self, on: bool) -> None:
        """Have the worker take no job, or again."""
        self.is_held = on
        await self.ask("hold" if on else "release")

    async def handed_over(self, calls: int) -> None:
        """Wait until so many calls are handed over, or until the supervisor has ended."""
        await until(
            lambda: self.events("call handed over") >= calls or self.process.poll() is not None, pause=0.02
        )

    async def ended(self) -> dict[str, Any]:
        """Wait for the end, and return the receipt."""
        await until(lambda: self.process.poll() is not None, pause=0.02)
        receipt: dict[str, Any] = json.loads((self.directory / "receipt.json").read_text())
        return receipt


@asynccontextmanager
async def side(
    server: DispatchServer,
    directory: Path,
    *options: str,
    agent: str = AGENT,
    rooms: bool = True,
    config: str = PATIENT,
    environment: dict[str, str],
) -> AsyncIterator[Side]:
    """Start a supervisor of one worker, and wait until the worker has registered."""
    directory.mkdir(parents=True)
    before = set(server.peers)
    given = {**server.environment, **environment}
    if rooms:
        given[variables.REHEARSAL] = WorkerSettings(local_url=server.url).to_json()
    process = start(supervised(*options, agent, directory=directory, config=config), given, directory)
    try:
        await until(
            lambda: process.poll() is not None or any(each.id not in before for each in server.available()),
            pause=0.02,
        )
        if process.poll() is not None:
            raise RuntimeError((directory / "log").read_text())
        yield Side(process, directory, next(each.id for each in server.available() if each.id not in before))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGQUIT)
        process.wait(30)


def notes(file: Path, what: str) -> list[dict[str, Any]]:
    """Return what the jobs have written down of one kind."""
    lines = file.read_text().splitlines()
    found = [json.loads(line) for line in lines if f'"what": "{what}"' in line and line.endswith("}")]
    return [each for each in found if each["what"] == what]


class Passing:
    """One call that is passed to and fro, and the figures of that."""

    def __init__(self, server: DispatchServer, watch: Watch, job_log: Path) -> None:
        self.job = ""
        self.done: list[float] = []
        self.speaks: list[float] = []
        self.silence: list[float] = []
        self.overlapping = 0
        self._server = server
        self._watch = watch
        self._job_log = job_log

    async def begin(self, serving: Side) -> None:
        """Have the call begin."""
        self.job = (await self._server.dispatch("room", metadata="{}", only=serving.peer)).job_id
        serving.jobs += 1
        await until(lambda: notes(self._job_log, "speaks"))

    async def once(self, source: Side, target: Side) -> None:
        """Hand the call over, once the other supervisor alone takes it and has a warm process."""
        server, frames = self._server, self._watch.frames
        if target.is_held:
            await target.hold(False)
        await source.hold(True)
        await server.until(lambda: [each.id for each in server.available()] == [target.peer], 30)
        await until(lambda: target.warmed > target.jobs, 60, 0.05)
        await asyncio.sleep(0.5)  # the old process has ended by then
        before = source.events("call handed over")
        began = time.monotonic()
        await source.ask("handover", job=self.job)
        over_at = await until(lambda: source.events("call handed over") > before, pause=0.001)
        self.done.append(over_at - began)
        speaks = notes(self._job_log, "speaks")[-1]
        self.speaks.append(speaks["at"] - began)
        self.job = speaks["job"]
        target.jobs += 1
        new = f"bot~{len(self.done)}"
        await until(lambda: sum(who == new for _, who in frames) > 25, pause=0.05)
        begins = next(at for at, who in frames if who == new)
        self.overlapping += sum(at > begins for at, who in frames if who != new)
        self.silence.append(max(0.0, begins - max(at for at, who in frames if who != new) - FRAME))
        frames[:] = [each for each in frames if each[1] == new]


async def handovers(runs: int, directory: Path) -> dict[str, Any]:
    """Pass one call to and fro, each time to the supervisor that has a warm process."""
    watch = Watch()
    job_log = directory / "jobs"
    job_log.touch()
    async with DispatchServer(on_event=watch.look) as server:
        watch.attach(server)
        environment = {"JOB_LOG": str(job_log)}
        async with (
            side(server, directory / "a", environment=environment) as first,
            side(server, directory / "b", environment=environment) as second,
        ):
            server.rooms.open("room")
            caller = server.rooms.visit("room", "caller")
            passing = Passing(server, watch, job_log)
            await passing.begin(first)
            for run in range(runs):
                await passing.once(*((second, first) if run % 2 else (first, second)))
                print(f"  handover {run + 1}/{runs}: {passing.done[-1] * 1000:.0f} ms", file=sys.stderr)
            is_there = caller.is_connected
    return {
        "livekit_agents": version("livekit-agents"),
        "done": summary(passing.done),
        "speaks": summary(passing.speaks),
        "silence": summary(passing.silence),
        "overlapping_frames": passing.overlapping,
        "moments_without_agent": watch.without_agent,
        "caller_is_there": is_there,
    }


async def goodbye(jobs: int, directory: Path) -> tuple[float, list[float]]:
    """Stop one worker, and return what the fence took, and when after it each job was told."""
    job_log = directory / "jobs"
    job_log.touch()
    environment = {"JOB_LOG": str(job_log), "IDLE": str(IDLE)}
    async with (
        DispatchServer() as server,
        side(
            server, directory / "side", "--grace", "60", agent=TOLD, rooms=False, environment=environment
        ) as supervisor,
    ):
        for number in range(jobs):
            await server.dispatch(f"room-{number}", metadata="{}")
        await until(lambda: len(notes(job_log, "started")) == jobs, 120, 0.1)
        await until(lambda: supervisor.warmed >= jobs + IDLE, 120, 0.1)
        await asyncio.sleep(SETTLED_AFTER)
        sent = time.monotonic()
        supervisor.process.terminate()
        await server.until(lambda: not server.available(), 20)
        full_at = next(each.at for each in server.events if each.kind == "full" and each.at >= sent)
        await until(lambda: len(notes(job_log, "told")) == jobs, 30, 0.05)
        job_log.with_name(job_log.name + ".go").touch()
        await until(lambda: supervisor.process.poll() is not None)
        return full_at - sent, [each["at"] - full_at for each in notes(job_log, "told")]


async def goodbyes(runs: int, jobs: int) -> dict[str, Any]:
    """Stop a worker of so many jobs that use `lastcall.call`, again and again."""
    fence, told = [], []
    for run in range(runs):
        with tempfile.TemporaryDirectory() as name:
            took, each_told = await goodbye(jobs, Path(name))
        fence.append(took)
        told += each_told
        print(f"  fence with {jobs} jobs {run + 1}/{runs}: {took * 1000:.1f} ms", file=sys.stderr)
    return {"fence": summary(fence), "told": summary(told) if told else None}


async def keeps(times: int) -> dict[str, Any]:
    """Time `call.keep` of a value that is ready, in a call that is connected to a worker."""
    turn = {"role": "user", "content": "I would like to move my appointment of Tuesday to next week, please."}
    state = {"turns": [turn] * (READY_BYTES // len(json.dumps(turn)))}
    calls = Calls(close_needed=20.0)
    calls.open(asyncio.get_running_loop())
    took = []
    try:
        call = Call(SimpleNamespace(job=SimpleNamespace(id="AJ_x"), room=None), calls.address)
        for _ in range(times):
            began = time.perf_counter()
            call.keep(state)
            took.append(time.perf_counter() - began)
            await asyncio.sleep(0)
        await call.aclose()
    finally:
        calls.close()
    return {"bytes": len(json.dumps(state)), **summary(took)}


async def figures_of_handovers(runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        return await handovers(runs, Path(name))


def older(python: str, runs: int) -> dict[str, Any]:
    """Take the figures of the handovers with an older livekit-agents."""
    command = [python, "-m", "scripts.bench_handover", "--only-handovers", "--runs", str(runs)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def page(figures: dict[str, Any]) -> str:
    new, old, busy = figures["new"], figures["old"], figures["busy"]
    told, keep = busy["told"], figures["keep"]
    rows = [
        (
            "silence between the agents, beside the 20 ms of a frame",
            new["silence"],
            "p50 ≤ 30 ms, p99 ≤ 100 ms",
        ),
        (f"the same, livekit-agents {old['livekit_agents']}", old["silence"], "the same"),
        ("decision → done, with a warm process elsewhere", new["done"], "p50 ≤ 600 ms, p99 ≤ 900 ms"),
        (f"the same, livekit-agents {old['livekit_agents']}", old["done"], "p50 ≤ 800 ms"),
        (f"fence → told, {JOBS} jobs that use `lastcall.call`", told, "p99 ≤ 100 ms"),
        ("SIGTERM → worker seen FULL, no job", figures["idle"]["fence"], "for comparison"),
        (f"the same, {JOBS} jobs that use `lastcall.call`", busy["fence"], "as without"),
        (f"`call.keep` of a ready value of {keep['bytes'] / 1000:.0f} kB", keep, "≤ 1 ms"),
    ]
    overlap = f"{new['overlapping_frames']}, {old['overlapping_frames']}"
    without = f"{new['moments_without_agent']}, {old['moments_without_agent']}"
    return "\n".join(
        [
            f"Measured by `scripts/bench handover --write` on {figures['machine']}.",
            "",
            "| what | n | p50 ms | p99 ms | aim |",
            "| --- | --- | --- | --- | --- |",
            *(f"| {name} | {v['n']} | {v['p50_ms']} | {v['p99_ms']} | {aim} |" for name, v, aim in rows),
            "",
            f"| what | {new['livekit_agents']}, {old['livekit_agents']} | aim |",
            "| --- | --- | --- |",
            f"| frames of the old agent after the first of the new one | {overlap} | 0 |",
            f"| moments without an agent in the room | {without} | 0 |",
        ]
    )


async def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench handover", description=__doc__)
    parser.add_argument("--runs", type=int, default=30, help="handovers of each version")
    parser.add_argument("--older", default="", help="python of an environment with an older livekit-agents")
    parser.add_argument("--only-handovers", action="store_true", help="print the figures of this version")
    parser.add_argument("--write", action="store_true", help="write into docs/performance.md")
    given = parser.parse_args()
    if given.only_handovers:
        print(json.dumps(await figures_of_handovers(given.runs)))
        return
    figures: dict[str, Any] = {"machine": machine(), "keep": await keeps(1000)}
    figures["new"] = await figures_of_handovers(given.runs)
    figures["old"] = await asyncio.to_thread(older, given.older, given.runs)
    fences = max(3, given.runs // 3)
    figures["idle"] = await goodbyes(fences, 0)
    print(json.dumps(figures), file=sys.stderr)
    figures["busy"] = await goodbyes(fences, JOBS)
    print(json.dumps(figures, indent=2))
    if given.write:
        write_section("handover", page(figures))


if __name__ == "__main__":
    asyncio.run(main())
