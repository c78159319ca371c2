"""A stop of many long calls, each of which has to go on elsewhere: `scripts/bench handover-load`.

A supervisor serves so many calls that last longer than its grace. Two others have a quarter as many warm
processes between them. The first is stopped, and one of the others as soon as it serves some of the calls.
Each call should then be served by the last supervisor. The agents speak in frames of 1 s, which leave the
processor of a small machine to the handovers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from lastcall.worker.local.livekit_server import DispatchServer
from lastcall.worker.local.room_server import Visitor
from lastcall.worker.local.rooms import Kind
from scripts.bench import machine, started, until
from scripts.bench_handover import Side, notes, side
from scripts.pages import write_section

# livekit-agents 1.8 looks at the event loop of each job every 20 ms. A hundred jobs take a core for that.
UNWATCHED = {"LIVEKIT_AGENTS_LOOP_BLOCK_WARN_MS": "0"}
# Seconds of a frame of an agent, and of grace.
LONG_FRAME = 1.0
LONG_GRACE = 10.0
LONG = "[stall]\nmisses = 60\n"


class LongCalls:
    """Calls that go on for longer than any stop, and the supervisors that serve them in turn."""

    def __init__(self, server: DispatchServer, directory: Path, stack: AsyncExitStack, calls: int) -> None:
        self.server = server
        self.calls = calls
        self.job_log = directory / "jobs"
        self.job_log.touch()
        self._directory = directory
        self._stack = stack
        self._sides = 0
        self._callers: list[Visitor] = []

    async def serve(self, warm: int) -> Side:
        """Start a supervisor with so many processes that wait for a job."""
        self._sides += 1
        environment = {"JOB_LOG": str(self.job_log), "IDLE": str(warm), "FRAME": str(LONG_FRAME), **UNWATCHED}
        directory = self._directory / f"side-{self._sides}"
        options = ("--grace", f"{LONG_GRACE:g}")
        made = await self._stack.enter_async_context(
            side(self.server, directory, *options, config=LONG, environment=environment)
        )
        await until(lambda: made.warmed >= warm, 120, 0.1)
        await started(made.process.pid, 120)
        return made

    async def begin(self, turn: int, serving: Side) -> None:
        """Have all the calls of one round begin, and wait until each agent speaks."""
        before = len(notes(self.job_log, "speaks"))
        for number in range(self.calls):
            room = f"room-{turn}-{number}"
            self.server.rooms.open(room)
            self._callers.append(self.server.rooms.visit(room, "caller"))
            done = await self.server.dispatch(room, metadata="{}", only=serving.peer)
            if done.outcome != "assigned":
                shown = {each.id: (each.available, each.load) for each in self.server.peers.values()}
                raise RuntimeError(
                    f"{room}: {done.outcome} by {serving.peer} of {shown}\n{serving.log[-4000:]}"
                )
        await until(lambda: len(notes(self.job_log, "speaks")) == before + self.calls, 180, 0.2)

    def served(self, turn: int) -> int:
        """Return in how many rooms of a turn there is a caller with exactly one agent."""
        count = 0
        for room in self.server.rooms.state:
            kinds = [each.kind for each in room.participants.values()]
            of_turn = room.info.name.startswith(f"room-{turn}-")
            count += of_turn and len(kinds) == 2 and kinds.count(Kind.AGENT) == 1
        return count

    @property
    def _agents(self) -> int:
        kinds = [each.kind for room in self.server.rooms.state for each in room.participants.values()]
        return kinds.count(Kind.AGENT)

    async def hang_up(self) -> None:
        """Have every caller say good-bye, and wait until the agents have left."""
        data = base64.b64encode(b"hang up").decode()
        for caller in self._callers:
            caller.say(do="relay", to=[], what={"do": "data", "data": data, "topic": ""})
        await until(lambda: not self._agents, 120, 0.2)
        for caller in self._callers:
            caller.leave()
        self._callers.clear()

    def two_at_once(self) -> int:
        """Return how often two agents of a room spoke at a time, by the notes of the agents.

        An agent that is killed notes no end. It ends when the server loses or removes it.
        """
        sessions: dict[str, tuple[str, str]] = {}
        lost: dict[tuple[str, str], float] = {}
        for each in self.server.events:
            who = (str(each.detail.get("room")), str(each.detail.get("identity")))
            if each.kind == "joined":
                sessions[str(each.detail["participant"])] = who
            elif each.kind == "hangup":
                lost.setdefault(sessions[str(each.detail["participant"])], each.at)
            elif each.kind in ("ghost", "left"):
                lost.setdefault(who, each.at)
        identities = {each["job"]: each["identity"] for each in notes(self.job_log, "connected")}
        spans: dict[str, list[tuple[float, float]]] = {}
        speaking: dict[str, tuple[float, str]] = {}
        for line in self.job_log.read_text().splitlines():
            note = json.loads(line)
            if note["what"] == "speaks":
                speaking.setdefault(note["job"], (note["at"], note["room"]))
            elif note["what"] in ("silent", "disconnected", "ended") and note["job"] in speaking:
                begun, room = speaking.pop(note["job"])
                spans.setdefault(room, []).append((begun, note["at"]))
        for job, (begun, room) in speaking.items():
            end = lost.get((room, identities[job]), float("inf"))
            spans.setdefault(room, []).append((begun, end))
        return sum(
            earlier[1] > later[0] for times in spans.values() for earlier, later in pairwise(sorted(times))
        )


async def load(rounds: int, calls: int, directory: Path) -> dict[str, Any]:
    """Stop a supervisor of long calls, and that of their successors in the middle, again and again."""
    totals: Counter[str] = Counter()
    alive = 0
    seconds: list[float] = []
    async with DispatchServer() as server, AsyncExitStack() as stack:
        long = LongCalls(server, directory, stack, calls)
        serving = await long.serve(calls // 4)
        for turn in range(rounds):
            await long.begin(turn, serving)
            first = await long.serve(calls // 8)
            second = await long.serve(calls // 4 - calls // 8)
            began = time.monotonic()
            serving.process.terminate()
            await serving.handed_over(calls // 4)
            first.process.terminate()
            for each in (serving, first):
                receipt = await each.ended()
                totals.update(dict(receipt["totals"]))
                reasons = Counter(str(job.get("handover")) for job in receipt["jobs"] if job["fate"] == "cut")
                print(f"  {receipt['outcome']} {receipt['totals']} {dict(reasons)}", file=sys.stderr)
            seconds.append(time.monotonic() - began)
            with suppress(TimeoutError):  # the server shows an agent that was killed for some time
                await until(lambda turn=turn: long.served(turn) == calls, 30, 0.2)  # type: ignore[misc]
            alive += long.served(turn)
            print(f"  round {turn + 1}/{rounds}: {long.served(turn)} of {calls} alive", file=sys.stderr)
            await long.hang_up()
            serving = second
        doubled = long.two_at_once()
    return {
        "machine": machine(),
        "calls": rounds * calls,
        "at_a_time": calls,
        "alive": alive,
        "handed_over": totals["handed_over"],
        "cut": totals["cut"],
        "lost": totals["lost"],
        "failed": totals["failed"],
        "two_at_once": doubled,
        "longest_stops_s": round(max(seconds), 1),
    }


def page(figures: dict[str, Any]) -> str:
    rows = [
        ("calls, at a time", f"{figures['calls']}, {figures['at_a_time']}", ""),
        ("cut, lost, failed", f"{figures['cut']}, {figures['lost']}, {figures['failed']}", "0"),
        ("handed over", str(figures["handed_over"]), ""),
        ("calls with exactly one agent at the end", str(figures["alive"]), str(figures["calls"])),
        ("two agents that speak at a time", str(figures["two_at_once"]), "0"),
    ]
    return "\n".join(
        [
            f"Measured by `scripts/bench handover-load --write` on {figures['machine']}, with a grace of"
            f" {LONG_GRACE:g} s, and without the watch of livekit-agents over each event loop.",
            "",
            "| what | figure | aim |",
            "| --- | --- | --- |",
            *(f"| {name} | {figure} | {aim} |" for name, figure, aim in rows),
        ]
    )


async def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench handover-load", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="stops of two supervisors")
    parser.add_argument("--calls", type=int, default=50, help="calls at a time")
    parser.add_argument("--write", action="store_true", help="write into docs/performance.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = await load(given.rounds, given.calls, Path(name))
    print(json.dumps(figures, indent=2))
    if given.write:
        write_section("handover-load", page(figures))


if __name__ == "__main__":
    asyncio.run(main())
