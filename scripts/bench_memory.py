"""The memory of workers: with an image, without one, and as so many processes of `python agent.py start`.

Every figure is PSS from /proc/PID/smaps_rollup, in which a page of n processes counts with an n-th in each.
The figure is that of the whole tree once it is idle, with two waiting job processes a worker.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from lastcall.worker.base.memory import processes_below, shares
from lastcall.worker.local.livekit_server import DispatchServer
from scripts.bench import children, machine, rss_mb, start, started, supervised
from scripts.pages import write_section

AGENT = """
{imports}
from livekit.agents import JobContext, WorkerOptions, cli

async def entrypoint(ctx: JobContext) -> None:
    ...

if __name__ == "__main__":
    cli.run_app(
        # Any port: those of several stock command lines would collide.
        WorkerOptions(entrypoint_fnc=entrypoint, num_idle_processes=2, load_threshold=float("inf"), port=0)
    )
"""
PLAIN, MORE = "", "import numpy, openai"
IMAGE, OFF, STOCK = "image", "off", "stock"
MODES = (IMAGE, OFF, STOCK)
IDLE = 2


def agent(directory: Path, imports: str) -> str:
    """Write an agent that does nothing, and keeps two job processes waiting; return its path."""
    path = directory / "agent.py"
    path.write_text(AGENT.format(imports=imports))
    return str(path)


@contextmanager
def running(
    mode: str, workers: int, agent: str, server: DispatchServer, directory: Path
) -> Iterator[list[int]]:
    """Start so many workers in one of the three ways; yield the pids of what was started."""
    if mode == STOCK:
        commands = [[sys.executable, agent, "start"]] * workers
    else:
        # A worker that was ready for a second is stable: the failure after it is retried at once.
        config = f"[start]\nimage = {'true' if mode == IMAGE else 'false'}\n[restart]\nperiod = 1\n"
        commands = [supervised("-w", str(workers), agent, directory=directory, config=config)]
    # Without compiled modules each start would compile lastcall, and pip has compiled livekit-agents.
    environment = {**server.environment, "PYTHONDONTWRITEBYTECODE": ""}
    with ExitStack() as stack:
        processes = []
        for command in commands:
            process = start(command, environment, directory)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            processes.append(process)
        yield [process.pid for process in processes]


async def measure(mode: str, workers: int, agent: str, directory: Path) -> dict[str, float]:
    """Return the megabytes of a whole tree, and what is private of a waiting job process."""
    async with DispatchServer() as server:
        with running(mode, workers, agent, server, directory) as pids:
            await server.until(lambda: len(server.available()) == workers, 180)
            await settled(pids)
            below = processes_below(pids)
            tree = [*pids, *(process.pid for pid in pids for process in below[pid])]
            figures = {"pss_mb": sum(shares(pid).pss for pid in tree) / 1e6}
            jobs = [pid for pid in tree if _is_waiting_job(pid)]
            if jobs:
                figures["job_private_mb"] = statistics.median(shares(pid).private for pid in jobs) / 1e6
            if mode != STOCK:
                figures["supervisor_rss_mb"] = rss_mb(pids[0])
            return figures


async def settled(pids: list[int]) -> None:
    """Wait until every process that is to come is there: no new one and nearly no CPU, three looks in a row.

    One look is not enough on a busy machine, where a tree that waits for the processor seems idle.
    """
    before: set[int] = set()
    alike = 0
    while alike < 3:
        for pid in pids:
            await started(pid, 120)
        tree = {process.pid for each in processes_below(pids).values() for process in each}
        alike = alike + 1 if tree == before else 0
        before = tree


def _is_waiting_job(pid: int) -> bool:
    """Tell a job process of lastcall's workers: it is named as the forkserver is, and has no children."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return False
    return name == "forkserver" and not children(pid)


async def figures_of(rounds: int, directory: Path) -> dict[str, Any]:
    """Take turns, so that a slow minute of the machine hits all of them."""
    seen: dict[str, list[dict[str, float]]] = {}
    for round in range(rounds):
        for imports, sizes in ((PLAIN, (1, 4)), (MORE, (1, 4))):
            for workers in sizes:
                for mode in MODES:
                    found = await measure(mode, workers, agent(directory, imports), directory)
                    seen.setdefault(f"{mode} {workers} {imports}".strip(), []).append(found)
                    print(f"  {round + 1}/{rounds} {mode} {workers} {imports} {found}", file=sys.stderr)
    return {
        name: {key: round_(statistics.median(each[key] for each in found)) for key in found[0]}
        for name, found in seen.items()
    }


def round_(value: float) -> float:
    return round(value, 1)


def page(figures: dict[str, Any], rounds: int) -> str:
    seen = figures["memory"]

    def pss(mode: str, workers: int, imports: str) -> float:
        return float(seen[f"{mode} {workers} {imports}".strip()]["pss_mb"])

    rows = []
    for imports, also in ((PLAIN, ""), (MORE, ", numpy and openai imported too")):
        for workers, aim in ((1, 1.10), (4, 0.40)):
            image, off, stock = (pss(mode, workers, imports) for mode in MODES)
            name = f"{workers} worker{'s' if workers > 1 else ''}{also}"
            rows.append(
                f"| {name} | {image} | {off} | {stock} | {image / off:.2f} of off | ≤ {aim:.2f} of off |"
            )
        more = [(pss(mode, 4, imports) - pss(mode, 1, imports)) / 3 for mode in MODES]
        cells = " | ".join(f"{each:.1f}" for each in more)
        rows.append(f"| each further worker{also} | {cells} | {more[0]:.1f} MB | ≤ 60 MB |")
    job = seen[f"{IMAGE} 4"].get("job_private_mb", float("nan"))
    supervisor = seen[f"{IMAGE} 4"]["supervisor_rss_mb"]
    return "\n".join(
        [
            f"Measured by `scripts/bench memory --write` on {figures['machine']}.",
            f"Megabytes of PSS, medians of {rounds} runs.",
            "",
            "| what | image | `image = false` | `python agent.py start` | figure | aim |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "| what | figure | aim |",
            "| --- | --- | --- |",
            f"| private memory of a waiting job process, image | {job} MB | ≤ 10 MB |",
            f"| resident memory of the supervisor of 4 workers, image | {supervisor} MB | ≤ 45 MB |",
        ]
    )


async def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench memory", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--write", action="store_true", help="write into docs/performance.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = await figures_of(arguments.rounds, Path(name))
    figures = {"machine": machine(), "memory": found}
    print(json.dumps(figures, indent=2))
    if arguments.write:
        write_section("memory", page(figures, arguments.rounds))


if __name__ == "__main__":
    asyncio.run(main())
