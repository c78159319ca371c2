"""The time of starts: with an image, without one, and as so many processes of `python agent.py start`.

Times are taken from outside: the launch and the SIGKILL just before they are done, a child when /proc lists
it, a registration when the LiveKit server has it. A worker has two waiting job processes, and registers when
the first is warm.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from lastcall.worker.local.livekit_server import DispatchServer
from scripts.bench import (
    LASTCALL,
    children,
    machine,
    rss_mb,
    start,
    summary,
    supervised,
    until,
)
from scripts.bench_memory import IMAGE, MODES, OFF, PLAIN, STOCK, agent, running, settled
from scripts.pages import write_section

# Workers among which one is killed. The others go on, as they would in production.
WORKERS = 4


async def first_children(runs: int, directory: Path) -> dict[str, Any]:
    """Launch a supervisor, and wait for its first child: of an image, of a worker, of any program."""
    seen: dict[str, list[float]] = {"image": [], "worker": [], "opaque": []}
    path = agent(directory, PLAIN)
    off = "[start]\nimage = false\n"
    for _ in range(runs):
        for name, words, config in (
            ("image", (path,), "[start]\nimage = true\n"),
            ("worker", (path,), off),
            ("opaque", ("--", "sleep", "1000"), ""),
        ):
            began = time.monotonic()
            process = start(supervised(*words, directory=directory, config=config), {}, directory)
            try:
                while not children(process.pid):
                    os.sched_yield()
                seen[name].append(time.monotonic() - began)
            finally:
                process.send_signal(signal.SIGQUIT)
                process.wait()
    return {name: summary(times) for name, times in seen.items()}


async def verbs(runs: int, directory: Path) -> dict[str, Any]:
    """Ask a supervisor of two opaque workers for its status, for people and as JSON; and its memory."""
    command = supervised("-w", "2", "--", "sleep", "1000", directory=directory)
    process = start(command, {}, directory)
    seen: dict[str, list[float]] = {"status": [], "status --json": []}
    try:
        await until(lambda: len(children(process.pid)) == 2)
        await asyncio.sleep(1.0)
        for _ in range(runs):
            for name, times in seen.items():
                began = time.monotonic()
                words = [*name.split(), "--control", str(directory / "c")]
                subprocess.run([*LASTCALL, *words], stdout=subprocess.DEVNULL, check=True)
                times.append(time.monotonic() - began)
        rss = rss_mb(process.pid)
    finally:
        process.terminate()
        process.wait()
    return {name: summary(times) for name, times in seen.items()} | {"rss_mb": round(rss, 1)}


async def registrations(mode: str, workers: int, path: str, directory: Path) -> list[float]:
    """Launch, and return the seconds until each worker has registered, the first one first."""
    async with DispatchServer() as server:
        began = time.monotonic()
        with running(mode, workers, path, server, directory):
            await server.until(lambda: len(server.available()) == workers, 180)
            times = [event.at - began for event in server.events if event.kind == "registered"]
        return sorted(times)[:workers]


async def replacements(mode: str, runs: int, path: str, directory: Path) -> list[float]:
    """SIGKILL one of the workers, and wait until its replacement has registered; again and again.

    A stock command line has nobody who replaces it: here the bench does, at once.
    """
    times: list[float] = []
    async with DispatchServer() as server:
        with running(mode, WORKERS, path, server, directory) as pids:
            await server.until(lambda: len(server.available()) == WORKERS, 180)
            for run in range(runs):
                await settled(pids)
                victim = pids[0] if mode == STOCK else _a_worker(pids[0])
                seen = len([event for event in server.events if event.kind == "registered"])
                killed = time.monotonic()
                os.kill(victim, signal.SIGKILL)
                if mode == STOCK:
                    environment = {**server.environment, "PYTHONDONTWRITEBYTECODE": ""}
                    again = start([sys.executable, path, "start"], environment, directory)
                    pids.append(again.pid)
                    del pids[0]
                await server.until(
                    lambda: len([e for e in server.events if e.kind == "registered"]) > seen,  # noqa: B023
                    60,
                )
                last = [event.at for event in server.events if event.kind == "registered"][-1]
                times.append(last - killed)
                print(f"  {mode} replacement {run + 1}/{runs} {times[-1]:.3f}", file=sys.stderr)
    return times


def _a_worker(supervisor: int) -> int:
    """Return a child that is no image."""
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in children(supervisor)}
    return next(pid for pid, name in names.items() if name != "lastcall-image")


def page(figures: dict[str, Any]) -> str:
    first, asked, up, back = (figures[name] for name in ("first_child", "verbs", "registered", "replaced"))
    rows = [
        ("launch → the first child: the image", first["image"], "p50 ≤ 150 ms"),
        ("… a worker, `image = false`", first["worker"], "p50 ≤ 150 ms"),
        ("… an opaque worker", first["opaque"], "p50 ≤ 150 ms"),
        ("`lastcall status`", asked["status"], "p50 ≤ 120 ms"),
        ("`lastcall status --json`", asked["status --json"], "p50 ≤ 120 ms"),
        (
            f"SIGKILL of one of {WORKERS} workers → its replacement has registered",
            back[IMAGE],
            "p50 ≤ 200 ms, p99 ≤ 350 ms",
        ),
        ("the same, `image = false`", back[OFF], "for comparison"),
        ("the same, `python agent.py start` started again at once", back[STOCK], "for comparison"),
    ]
    ratio = back[IMAGE]["p50_ms"] / back[STOCK]["p50_ms"]
    one = up[IMAGE]["1"] / up[OFF]["1"]
    eight = up[IMAGE]["8"] / up[OFF]["8"]

    def seconds(workers: str) -> str:
        return " | ".join(f"{up[mode][workers]:.2f}" for mode in MODES)

    return "\n".join(
        [
            f"Measured by `scripts/bench start --write` on {figures['machine']}.",
            "",
            "| what | n | p50 ms | p99 ms | aim |",
            "| --- | --- | --- | --- | --- |",
            *(f"| {name} | {v['n']} | {v['p50_ms']} | {v['p99_ms']} | {aim} |" for name, v, aim in rows),
            "",
            "| all registered after, s | image | `image = false` | `python agent.py start` | figure | aim |",
            "| --- | --- | --- | --- | --- | --- |",
            f"| 1 worker | {seconds('1')} | {one:.2f} of off | ≤ 0.80 of off |",
            f"| 8 workers | {seconds('8')} | {eight:.2f} of off | ≤ 0.25 of off |",
            "",
            "| what | figure | aim |",
            "| --- | --- | --- |",
            f"| each further of 8 workers, image | {up[IMAGE]['further_ms']} ms | ≤ 120 ms |",
            f"| replacement with an image, beside the stock one | {ratio:.2f} of it | ≤ 0.10 of it |",
            f"| resident memory of a supervisor of 2 opaque workers | {asked['rss_mb']} MB | ≤ 45 MB |",
        ]
    )


async def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench start", description=__doc__)
    parser.add_argument("--runs", type=int, default=30, help="kills with an image, and launches")
    parser.add_argument("--rounds", type=int, default=3, help="starts of 1 and of 8 workers")
    parser.add_argument("--write", action="store_true", help="write into docs/performance.md")
    arguments = parser.parse_args()
    # Compiled modules, as pip leaves them.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        figures: dict[str, Any] = {"machine": machine()}
        await first_children(1, directory)  # compiles what is not compiled yet
        figures["first_child"] = await first_children(arguments.runs, directory)
        figures["verbs"] = await verbs(arguments.runs, directory)
        path = agent(directory, PLAIN)
        seen: dict[str, dict[str, list[float]]] = {mode: {"1": [], "8": [], "further": []} for mode in MODES}
        for _ in range(arguments.rounds):
            for workers in (1, 8):
                for mode in MODES:
                    times = await registrations(mode, workers, path, directory)
                    seen[mode][str(workers)].append(times[-1])
                    if workers > 1:
                        seen[mode]["further"].append((times[-1] - times[0]) / (workers - 1))
                    print(f"  {mode} {workers} workers {times[-1]:.2f} s", file=sys.stderr)
        figures["registered"] = {
            mode: {
                "1": summary(times["1"])["p50_ms"] / 1000,
                "8": summary(times["8"])["p50_ms"] / 1000,
                "further_ms": summary(times["further"])["p50_ms"],
            }
            for mode, times in seen.items()
        }
        figures["replaced"] = {}
        for mode, runs in ((IMAGE, arguments.runs), (OFF, arguments.runs // 3), (STOCK, arguments.runs // 3)):
            figures["replaced"][mode] = summary(await replacements(mode, runs, path, directory))
    print(json.dumps(figures, indent=2))
    if arguments.write:
        write_section("start", page(figures))


if __name__ == "__main__":
    asyncio.run(main())
