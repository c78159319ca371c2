"""The figures of `[start] image`: starts, crashes and memory, with the image, without, and of the stock CLI.

`scripts/bench start` and `scripts/bench memory` print a part each. All variants take turns in one run. A
worker has two waiting job processes. Memory is the proportional share (PSS) of all processes of a tree.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from lastcall.worker.local.livekit_server import DispatchServer
from scripts.bench import AGENT, children, machine, start, started, summary, supervised, until
from scripts.pages import write_section

# Workers of the larger start.
MANY = 8
# No pause between starts, and no back-off after a crash: the pauses are options, and no figures.
CONFIG = "[start]\nstagger = 0\nimage = {image}\n[restart]\nintensity = 1000\nbackoff = [0, 0]\n"
CLI = [sys.executable, AGENT, "start"]
VARIANTS = ("on", "off", "cli")
NAMES = {"on": "image", "off": "no image", "cli": "`python agent.py start`, N times"}


class Tree:
    """The started processes of one variant."""

    def __init__(self, variant: str, workers: int, server: DispatchServer, directory: Path) -> None:
        self.variant = variant
        self.workers = workers
        self.server = server
        self.directory = directory
        self.began = time.monotonic()
        if variant == "cli":
            self.roots = [self.one() for _ in range(workers)]
        else:
            config = CONFIG.format(image="true" if variant == "on" else "false")
            command = supervised("-w", str(workers), AGENT, directory=directory, config=config)
            self.roots = [start(command, server.environment, directory)]

    def one(self) -> subprocess.Popen[bytes]:
        return start(CLI, self.server.environment, self.directory)

    async def registered(self) -> float:
        """Return the seconds until all workers have registered."""
        await until(lambda: len(self.server.available()) == self.workers, 120, 0.002)
        return time.monotonic() - self.began

    def pids(self) -> list[int]:
        found = [root.pid for root in self.roots]
        for pid in found:  # grows meanwhile
            found += children(pid)
        return found

    def workers_of(self) -> list[int]:
        if self.variant == "cli":
            return [root.pid for root in self.roots]
        return [pid for pid in children(self.roots[0].pid) if name_of(pid) != "lastcall-image"]

    async def crash(self) -> float:
        """SIGKILL a worker; return the seconds until another has registered."""
        known = set(self.server.peers)
        victim = self.workers_of()[0]
        began = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        if self.variant == "cli":
            self.roots[0].wait()
            self.roots[0] = self.one()
        peers = self.server.peers
        await until(lambda: any(peers[new].registered for new in set(peers) - known), 60, 0.002)
        return time.monotonic() - began

    def end(self) -> None:
        for root in self.roots:
            root.terminate()
        for root in self.roots:
            try:
                root.wait(20)
            except subprocess.TimeoutExpired:
                root.kill()
                root.wait()


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def memory_of(pid: int) -> dict[str, float]:
    """Return the megabytes of a process: its proportional share, and what it shares with no other."""
    found = {"Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0])
    private = found["Private_Clean"] + found["Private_Dirty"]
    return {"pss": found["Pss"] / 1000, "private": private / 1000}


@asynccontextmanager
async def tree(variant: str, workers: int, directory: Path) -> AsyncIterator[Tree]:
    async with DispatchServer() as server:
        found = Tree(variant, workers, server, directory)
        try:
            yield found
        finally:
            found.end()


async def starts(runs: int, directory: Path) -> dict[str, Any]:
    """Return seconds from launch until all workers have registered."""
    seen: dict[str, dict[str, list[float]]] = {v: {"1": [], str(MANY): []} for v in VARIANTS}
    for run in range(runs):
        for workers in (1, MANY):
            for variant in VARIANTS:
                async with tree(variant, workers, directory) as found:
                    seen[variant][str(workers)].append(await found.registered())
        print(f"  starts {run + 1}/{runs}", file=sys.stderr)
    return {v: {n: round(statistics.median(s), 2) for n, s in each.items()} for v, each in seen.items()}


async def crashes(runs: int, directory: Path) -> dict[str, Any]:
    """Return how long it takes from SIGKILL of one of four workers until another has registered."""
    found = {}
    for variant in VARIANTS:
        times = []
        async with tree(variant, 4, directory) as trees:
            await trees.registered()
            for _ in range(runs if variant == "on" else max(3, runs // 4)):
                for root in trees.roots:
                    await started(root.pid)
                times.append(await trees.crash())
        found[variant] = summary(times)
        print(f"  crashes, {variant}", file=sys.stderr)
    return found


async def memory(directory: Path) -> dict[str, Any]:
    """Return the megabytes of one worker, of four, and of the waiting job processes."""
    found: dict[str, Any] = {}
    for variant in VARIANTS:
        figures: dict[str, float] = {}
        for workers in (1, 4):
            async with tree(variant, workers, directory) as trees:
                await trees.registered()
                for root in trees.roots:
                    await started(root.pid)
                each = {pid: memory_of(pid) for pid in trees.pids()}
                figures[str(workers)] = round(sum(m["pss"] for m in each.values()))
                jobs = [
                    each[job]["private"]
                    for worker in trees.workers_of()
                    for server in children(worker)
                    for job in children(server)
                    if job in each
                ]
                figures["job"] = round(max(jobs), 1)
        found[variant] = figures
        print(f"  memory, {variant}", file=sys.stderr)
    return found


def page(figures: dict[str, Any]) -> str:
    lines = [f"Measured by `scripts/bench start --write` on {figures['machine']}.", ""]
    lines += [f"| what | {' | '.join(NAMES[v] for v in VARIANTS)} |", "| --- | --- | --- | --- |"]

    def row(what: str, cell: Any) -> str:
        return f"| {what} | {' | '.join(cell(v) for v in VARIANTS)} |"

    s, c, m = figures["starts"], figures["crashes"], figures["memory"]
    lines += [
        row("launch → 1 worker registered, s", lambda v: f"{s[v]['1']}"),
        row(f"launch → {MANY} workers registered, s", lambda v: f"{s[v][str(MANY)]}"),
        row("SIGKILL of one of 4 workers → another registered, p50 ms", lambda v: f"{c[v]['p50_ms']}"),
        row("… p99 ms", lambda v: f"{c[v]['p99_ms']}"),
        row("… n", lambda v: f"{c[v]['n']}"),
        row("memory (PSS) of 1 worker, MB", lambda v: f"{m[v]['1']}"),
        row("memory (PSS) of 4 workers, MB", lambda v: f"{m[v]['4']}"),
        row("private memory of a waiting job process, at most, MB", lambda v: f"{m[v]['job']}"),
    ]
    return "\n".join(lines)


async def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench start", description=__doc__)
    parser.add_argument("part", choices=["start", "memory"])
    parser.add_argument("--runs", type=int, default=3, help="starts of each kind; ten times as many crashes")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if arguments.part == "memory" or arguments.write:
            figures["memory"] = await memory(directory)
        if arguments.part == "start" or arguments.write:
            figures["starts"] = await starts(arguments.runs, directory)
            figures["crashes"] = await crashes(arguments.runs * 10, directory)
    print(json.dumps(figures, indent=2))
    if arguments.write:
        write_section("image", page(figures))


if __name__ == "__main__":
    asyncio.run(main())
