"""Faults: a fault of lastcall cuts no call, and becomes an ordinary stop."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from lastcall.worker.job.session import VERSION
from tests.support.harness import AGENT, Run, StartRun
from tests.support.program import Program, ups

# Puts a fault into one place of the supervisor, then runs it as ever.
SABOTAGE = """
import asyncio, os, sys
sys.argv = ["lastcall", *sys.argv[1:]]
import lastcall.__main__ as program
from {package} import {module}

async def broken(self, *_, **__):
    while not os.path.exists(os.environ["JOB_LOG"] + ".fault"):
        await asyncio.sleep(0.02)
    raise RuntimeError("sabotaged")

{module}.{name} = broken
program.main()
"""
PLACES = {
    "watch": ("lastcall.supervisor.fleet", "stalls", "Watch.run"),
    "operations": ("lastcall.supervisor.fleet", "operations", "Operations.run"),
    "announcer": ("lastcall.supervisor.views", "service_manager", "Announcer.run"),
    "readiness": ("lastcall.supervisor", "app", "App._watch_readiness"),
    "report": ("lastcall.supervisor", "shutdown", "Shutdown._report"),
}


async def start(run: StartRun, directory: Path, place: str, *arguments: str) -> Run:
    """Start a supervisor that has a fault in one place, once `fault` is called."""
    package, module, name = PLACES[place]
    program = directory / "sabotage.py"
    program.write_text(SABOTAGE.format(package=package, module=module, name=name))
    own = directory / "1"
    options = ["--grace", "40", "--control", str(own / "c.sock"), "--receipt", str(own / "receipt.json")]
    r: Run = await run(
        command=[sys.executable, str(program), "run", "--http", "off", *options, *arguments],
        environment={"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    return r


def fault(r: Run) -> None:
    r.job_log.with_name(r.job_log.name + ".fault").touch()


async def names_the_fault(r: Run) -> None:
    """Wait for the end of the run, and see what the receipt says of it."""
    assert await r.exit() == 70
    receipt = r.receipt()
    assert receipt["outcome"] == "fault" and "sabotaged" in receipt["fault"]
    await r.nothing_left()


@pytest.mark.parametrize("place", ["watch", "report"])
async def test_fault_beside_the_workers(run: StartRun, tmp_path: Path, place: str) -> None:
    """The job ends by itself, the receipt names the fault."""
    r = await start(run, tmp_path, place, AGENT)
    await r.ready()
    job = await r.dispatch(mode="hold")
    await r.job_says(job.job_id, "started")
    if place == "report":  # it runs during a stop only
        r.kill()
    fault(r)
    await r.until(lambda: r.log("fault in lastcall" if place == "report" else "stop draining"))
    r.let_go()
    await names_the_fault(r)
    assert r.fates() == {job.job_id: "finished"}
    assert r.livekit.jobs[job.job_id].status == "JS_SUCCESS"


@pytest.mark.parametrize("place", ["operations", "announcer", "readiness"])
async def test_fault_beside_a_program(run: StartRun, program: Program, place: str) -> None:
    """The program of an opaque worker ends by itself, the receipt names the fault."""
    busy = program.directory / "busy"
    busy.touch()
    r = await start(run, program.directory, place, *program.arguments)
    await r.until(lambda: ups(r, "1"))
    fault(r)
    await r.until(lambda: r.log("stop draining"))
    assert "down" not in r.out.read_text()
    busy.unlink()
    await names_the_fault(r)
    assert "down 1 " in r.out.read_text()


async def test_a_job_that_can_not_be_launched_is_failed(run: StartRun) -> None:
    """No process can be had for it: the server hears so, while the worker lives on.

    livekit-agents before 1.8 goes on trying for as long as the worker lives; there the deadline ends it.
    """
    r: Run = await run("run", "--grace", "20", AGENT)
    await r.ready()
    r.break_prewarm()
    # Both at once: a worker that knows of a failed process, and has no other, takes no job.
    jobs = await asyncio.gather(r.dispatch("r1", sleep=0.1), r.dispatch("r2", sleep=0.1))
    statuses = [r.livekit.jobs[job.job_id] for job in jobs]
    code, fate = (0, "failed") if VERSION >= (1, 8) else (75, "cut")
    if fate == "cut":
        await r.until(lambda: "JS_SUCCESS" in {each.status for each in statuses})
        r.kill()
    await r.until(lambda: {each.status for each in statuses} == {"JS_SUCCESS", "JS_FAILED"}, 40)
    r.kill()
    assert await r.exit() == code
    totals = r.receipt()["totals"]
    assert (totals["finished"], totals[fate], totals["lost"]) == (1, 1, 0)
    await r.nothing_left()
