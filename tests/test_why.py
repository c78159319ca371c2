"""Bare workers, as `python agent.py start` runs them, in stops: the evidence of docs/why.md and the README.

The newest livekit-agents runs here. A test that fails says that livekit-agents has changed: mend the pages.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.harness import AGENT, Run, StartRun

pytestmark = pytest.mark.long

# The tests' agent, with the health port of a bare worker on a free one.
BARE = """
import sys
sys.path.insert(0, {agents!r})
import calls
from livekit.agents import WorkerOptions, cli

if __name__ == "__main__":
    cli.run_app(
        WorkerOptions(
            entrypoint_fnc=calls.entrypoint,
            load_fnc=calls.half_busy,
            load_threshold=float("inf"),
            num_idle_processes=1,
            drain_timeout={drain_timeout},
            port=0,
        )
    )
"""


async def bare(run: StartRun, directory: Path, *, drain_timeout: int = 3600) -> Run:
    """Start `python agent.py start`, and wait until the worker is registered."""
    agent = directory / "agent.py"
    agent.write_text(BARE.format(agents=str(Path(AGENT).parent), drain_timeout=drain_timeout))
    r: Run = await run(command=[sys.executable, str(agent), "start"])
    await r.ready()
    return r


def ended(r: Run) -> set[str]:
    """Return the jobs that came to the end of their entrypoint."""
    return {note["job"] for note in r.notes() if note["what"] == "ended"}


async def signalled_as_a_group(run: StartRun, directory: Path) -> tuple[Run, int]:
    """Return a worker with two calls whose group had a SIGTERM, and the pid of a program of one of them."""
    r = await bare(run, directory)
    calls = [await r.dispatch("a", sleep=100), await r.dispatch("b", sleep=100, mode="spawn")]
    await r.job_says(calls[0].job_id, "started")
    program = (await r.job_says(calls[1].job_id, "spawned"))["child"]
    # A process that is still starting would die too, and this worker then waits for it without an end.
    await r.until(lambda: r.out.read_text().count('"process initialized"') == len(calls) + 1, 30)
    r.kill_group()
    return r, program


async def test_a_signal_to_the_process_group_cuts_every_call(run: StartRun, tmp_path: Path) -> None:
    """One SIGTERM to the group ends the calls long before their time, with 0, and leaves their programs."""
    # Rarely the worker waits without an end all the same, and then has no exit code.
    for _ in range(3):
        r, program = await signalled_as_a_group(run, tmp_path)
        with suppress(subprocess.TimeoutExpired):  # the calls have 100 s to go
            await asyncio.to_thread(r.process.wait, 35)
            break
    assert await r.exit() == 0
    assert not ended(r)
    assert psutil.Process(program).is_running(), "a program that a call has started"


async def test_a_second_signal_cuts_every_call(run: StartRun, tmp_path: Path) -> None:
    """The first SIGTERM drains; the second one ends the worker and its calls. Nothing starts another."""
    r = await bare(run, tmp_path)
    call = await r.dispatch(sleep=100)
    pid = (await r.job_says(call.job_id, "started"))["pid"]
    r.kill()
    await r.until(lambda: not r.livekit.available())
    r.kill()
    assert await r.exit(60) == 1
    # Of this worker's other processes one stays at times.
    await r.until(lambda: all(each.pid != pid for each in r.left()), 30)
    assert not ended(r)


async def test_the_drain_timeout_is_no_bound(run: StartRun, tmp_path: Path) -> None:
    """With a drain timeout of 1 s the stop takes more than 10 s, cuts the call, and ends with 0."""
    r = await bare(run, tmp_path, drain_timeout=1)
    call = await r.dispatch(sleep=100)
    await r.job_says(call.job_id, "started")
    began = time.monotonic()
    r.kill(signal.SIGTERM)
    assert await r.exit(80) == 0
    assert time.monotonic() - began > 10
    assert not ended(r)
