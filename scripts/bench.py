"""The figures of docs/performance.md, in one run: lastcall beside `python agent.py start`.

Every time is taken from outside, on CLOCK_MONOTONIC: the signal just before it is sent, FULL when the
LiveKit server has read it, an exit when the parent sees it. Medians and percentiles over all runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from lastcall.worker.local.livekit_server import DispatchServer  # noqa: E402
from scripts.pages import write_section  # noqa: E402

AGENT = str(ROOT / "lastcall" / "worker" / "local" / "sample.py")
LASTCALL = [str(Path(sys.executable).parent / "lastcall")]

# CPU seconds of a tree in half a second, below which it is idle: a start uses all of a core. Ten processes of
# livekit-agents that wait used 0.06 on a slow machine.
IDLE_CPU = 0.15


def machine() -> str:
    """Name what the figures were measured on."""
    return (
        f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()},"
        f" CPython {platform.python_version()}, livekit-agents {version('livekit-agents')},"
        f" uvloop {version('uvloop')}"
    )


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def summary(values: list[float]) -> dict[str, float]:
    return {
        "n": len(values),
        "p50_ms": round(statistics.median(values) * 1000, 2),
        "p99_ms": round(percentile(values, 0.99) * 1000, 2),
    }


def children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


async def until(condition: Callable[[], object], timeout: float = 60.0, pause: float = 0.0005) -> float:
    """Wait for the condition; returns when it was first seen to hold."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        await asyncio.sleep(pause)
    return time.monotonic()


def start(command: list[str], environment: dict[str, str], directory: Path) -> subprocess.Popen[bytes]:
    log = open(directory / "log", "wb")  # noqa: SIM115  # closed with the bench
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def supervised(*arguments: str, directory: Path, config: str = "") -> list[str]:
    path = directory / "lastcall.toml"
    path.write_text(config)
    options = ["--http", "off", "--control", str(directory / "c"), "--config", str(path)]
    options += ["--receipt", str(directory / "receipt.json")]
    return [*LASTCALL, "run", *options, *arguments]


async def started(pid: int, timeout: float = 60.0) -> None:
    """Wait until a tree of processes is done with its start: nearly no CPU for half a second.

    A worker registers when its first job process is warm, and starts the others after that.
    """
    deadline = time.monotonic() + timeout
    used = tree_cpu(pid)
    while True:
        await asyncio.sleep(0.5)
        before, used = used, tree_cpu(pid)
        if used - before <= IDLE_CPU:
            return
        if time.monotonic() > deadline:
            raise TimeoutError


def tree_cpu(pid: int) -> float:
    """Return the CPU seconds of a process and of all below it; of one that has just ended, 0."""
    try:
        used = usage(pid)[0]
    except OSError:
        return 0.0
    return used + sum(tree_cpu(child) for child in children(pid))


async def fence_once(command: list[str], workers: int, directory: Path) -> tuple[float, float]:
    """Start, wait until registered, SIGTERM the pid; return seconds until FULL and until exit."""
    async with DispatchServer() as server:
        process = start(command, server.environment, directory)
        try:
            await server.until(lambda: len(server.available()) == workers, 60)
            await started(process.pid)
            sent = time.monotonic()
            process.send_signal(signal.SIGTERM)
            await server.until(lambda: not server.available(), 20)
            exited = await until(lambda: process.poll() is not None)
            fulls: dict[str, float] = {}
            for event in server.events:
                if event.kind == "full" and event.at >= sent:
                    fulls.setdefault(event.worker_id, event.at)
            if len(fulls) < workers:
                raise RuntimeError(f"only {len(fulls)} of {workers} workers said FULL")
            return max(fulls.values()) - sent, exited - sent
        finally:
            process.kill()
            process.wait()


async def fences(runs: int, directory: Path) -> dict[str, Any]:
    """Take turns, so that a slow minute of the machine hits all of them."""
    cli = [sys.executable, AGENT, "start"]
    two = supervised("-w", "2", "--grace", "60", AGENT, directory=directory)
    one = supervised("--grace", "60", AGENT, directory=directory)
    seen: dict[str, list[tuple[float, float]]] = {"cli": [], "two": [], "one": []}
    for run in range(runs):
        seen["cli"].append(await fence_once(cli, 1, directory))
        seen["two"].append(await fence_once(two, 2, directory))
        seen["one"].append(await fence_once(one, 1, directory))
        print(f"  fence {run + 1}/{runs}", file=sys.stderr)
    return {
        name: {"full": summary([f for f, _ in times]), "exit": summary([e for _, e in times])}
        for name, times in seen.items()
    }


async def crashes(runs: int, directory: Path) -> dict[str, float]:
    """SIGKILL a sleeping C program and wait for the next one."""
    config = "[restart]\nintensity = 1000\nbackoff = [0, 0]\n"
    command = supervised("--", "sleep", "1000", directory=directory, config=config)
    process = start(command, {}, directory)
    times = []
    try:
        await until(lambda: children(process.pid))
        await asyncio.sleep(0.5)
        for _ in range(runs):
            (child,) = children(process.pid)
            killed = time.monotonic()
            os.kill(child, signal.SIGKILL)
            while True:  # no sleep: the figure is as small as one
                now = children(process.pid)
                if now and now != [child]:
                    break
                os.sched_yield()  # the supervisor may be waiting for the very core that this loop is on
            times.append(time.monotonic() - killed)
            await asyncio.sleep(0.05)
    finally:
        process.terminate()
        process.wait()
    return summary(times)


async def hundred(directory: Path) -> dict[str, float]:
    """Start and stop a hundred programs."""
    command = supervised("-w", "100", "--", "sleep", "1000", directory=directory)
    process = start(command, {}, directory)
    try:
        first = await until(lambda: len(children(process.pid)) >= 1)
        all_up = await until(lambda: len(children(process.pid)) >= 100)
        await asyncio.sleep(1.0)
        sent = time.monotonic()
        process.terminate()
        while children(process.pid):
            pass
        gone = time.monotonic()
        while process.poll() is None:
            pass
        ended = time.monotonic()
    finally:
        process.kill()
        process.wait()
    return {
        "start_ms": round((all_up - first) * 1000, 1),
        "stop_ms": round((ended - sent) * 1000, 1),
        "after_last_child_ms": round((ended - gone) * 1000, 1),
    }


def usage(pid: int) -> tuple[float, int]:
    """Return CPU seconds and voluntary context switches of all threads."""
    cpu, switches = 0.0, 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        cpu += int((task / "schedstat").read_text().split()[0]) / 1e9
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                switches += int(line.split()[1])
    return cpu, switches


def rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


async def idle(
    command: list[str],
    ready: Callable[[int], object],
    seconds: float,
    environment: dict[str, str],
    directory: Path,
) -> dict[str, float]:
    """Measure a supervisor that has nothing to do."""
    process = start(command, environment, directory)
    try:
        await until(lambda: ready(process.pid), pause=0.05)
        await asyncio.sleep(3.0)
        cpu, switches = usage(process.pid)
        began = time.monotonic()
        await asyncio.sleep(seconds)
        cpu_after, switches_after = usage(process.pid)
        took = time.monotonic() - began
        size = rss_mb(process.pid)
    finally:
        process.terminate()
        process.wait()
    return {
        "cpu_ms_per_s": round((cpu_after - cpu) / took * 1000, 4),
        "wakeups_per_s": round((switches_after - switches) / took, 2),
        "rss_mb": round(size, 1),
    }


async def overruns(runs: int, directory: Path) -> list[float]:
    """Stop with a job that outlives its grace; return how far each stop went beyond it, in seconds."""
    over = []
    for _ in range(runs):
        command = supervised("--grace", "6", AGENT, directory=directory)
        async with DispatchServer() as server:
            process = start(command, server.environment, directory)
            try:
                await server.until(lambda: bool(server.available()), 60)
                await server.dispatch("long", metadata="600")
                await asyncio.sleep(1.0)
                sent = time.monotonic()
                process.terminate()
                while process.poll() is None:
                    await asyncio.sleep(0.0005)
                ended = time.monotonic()
                over.append(ended - sent - 6)
            finally:
                process.kill()
                process.wait()
    return over


def page(figures: dict[str, Any]) -> str:
    f, t, o = figures["fence"], figures["two_workers_idle"], figures["five_hundred_idle"]
    rows = [
        ("SIGTERM → every worker seen FULL, 2 workers", f["two"]["full"], "p50 ≤ 2 ms"),
        ("the same, `python agent.py start`, 1 worker", f["cli"]["full"], "for comparison"),
        ("SIGTERM → exit, idle, 1 worker", f["one"]["exit"], "p50 ≤ half of the next row"),
        ("the same, `python agent.py start`", f["cli"]["exit"], "for comparison"),
        ("crash → replacement started", figures["crash"], "p50 ≤ 3 ms, p99 ≤ 6 ms"),
    ]
    lines = [
        f"Measured by `scripts/bench --write` on {figures['machine']}.",
        "",
        "| what | n | p50 ms | p99 ms | aim |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {name} | {v['n']} | {v['p50_ms']} | {v['p99_ms']} | {aim} |" for name, v, aim in rows),
        "",
        "| what | figure | aim |",
        "| --- | --- | --- |",
        f"| 100 opaque workers started | {figures['hundred']['start_ms']} ms | ≤ 200 ms |",
        f"| … stopped, after the last of them had ended | {figures['hundred']['after_last_child_ms']} ms |"
        " ≤ 15 ms |",
        f"| supervisor of 500 idle opaque workers: wakeups | {o['wakeups_per_s']} /s | ≤ 1 /s |",
        f"| … CPU | {o['cpu_ms_per_s']} ms/s | ≤ 0.1 ms/s |",
        f"| supervisor of 2 idle livekit workers: CPU | {t['cpu_ms_per_s'] / 10:.3f} % of a core | ≤ 0.1 % |",
        f"| … resident memory | {t['rss_mb']} MB | ≤ 60 MB |",
        f"| stop with a job that outlives a grace of 6 s: beyond grace, worst of {figures['overrun_n']} |"
        f" {figures['overrun_s']:+.2f} s | ≤ +0.5 s |",
    ]
    return "\n".join(lines)


async def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=30, help="runs of each kind of stop")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        figures: dict[str, Any] = {"machine": machine()}
        figures["crash"] = await crashes(100, directory)
        figures["hundred"] = await hundred(directory)
        sleepers = supervised("-w", "500", "--", "sleep", "1000", directory=directory)
        figures["five_hundred_idle"] = await idle(
            sleepers, lambda pid: len(children(pid)) == 500, 30, {}, directory
        )
        async with DispatchServer() as server:
            command = supervised("-w", "2", AGENT, directory=directory)
            figures["two_workers_idle"] = await idle(
                command, lambda _pid: len(server.available()) == 2, 30, server.environment, directory
            )
        over = await overruns(3, directory)
        figures |= {"overrun_s": max(over), "overrun_n": len(over)}
        figures["fence"] = await fences(arguments.runs, directory)
    print(json.dumps(figures, indent=2))
    if arguments.write:
        write_section("core", page(figures))


if __name__ == "__main__":
    asyncio.run(main())
