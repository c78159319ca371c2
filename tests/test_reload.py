"""A fleet of real workers is reloaded, scaled, recycled and held under a stream of dispatches."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.support.harness import AGENT, START, Run, StartRun, lives
from tests.support.program import status, status_when, verb
from tests.support.stream import IDLE, Stream


@pytest.mark.core
@pytest.mark.alone
async def test_reload_under_a_stream(run: StartRun) -> None:
    """No job is lost, and a worker is always there: the new ones start one at a time, before the old end."""
    r: Run = await run("run", "-w", "2", "--grace", "60", AGENT, environment=IDLE)
    await r.ready(2)
    least: list[int] = []
    async with Stream(r) as stream:
        await stream.some(3)
        watching = asyncio.create_task(_least_available(r, least))
        await verb(r, "reload", "--wait", timeout=120)
        watching.cancel()
        await stream.some(3)
    await stream.all_ended()
    # The new one's word and the old one's travel on two connections, and may be read in either order.
    assert sum(count < 2 for count in least) <= 2, "there were fewer workers than before"
    started = [e["timestamp"] for e in r.log("slot starting") if e["generation"] == 2]
    draining = [e["timestamp"] for e in r.log("slot draining")]
    assert len(started) == 2 and started[0] < draining[0] <= started[1] < draining[1]
    r.kill()
    assert await r.exit() == 0
    assert r.receipt()["totals"]["lost"] == 0
    await r.nothing_left()


async def _least_available(r: Run, least: list[int]) -> None:
    while True:
        least.append(len(r.livekit.available()))
        await asyncio.sleep(0.005)


@pytest.mark.core
async def test_long_jobs_and_a_hold_outlast_a_reload(run: StartRun) -> None:
    """A job goes on in its old generation for as long as it likes, and a stop waits for it there.

    A worker that starts during a hold is held from its first moment on.
    """
    r: Run = await run("run", "--grace", "60", AGENT)
    await r.ready()
    job = await r.dispatch("long", mode="hold")
    await r.job_says(job.job_id, "started")
    await verb(r, "hold")
    await r.until(lambda: not r.livekit.available())
    await verb(r, "reload", "--wait", timeout=60)
    assert (await r.livekit.dispatch("held")).outcome == "no_worker"
    assert [event.job_id for event in r.events("accepted")] == [job.job_id]
    await verb(r, "release")
    await r.ready()
    slots = (await status(r))["slots"]
    assert [(s["generation"], s["state"], len(s["jobs"])) for s in slots] == [
        (1, "draining", 1),
        (2, "ready", 0),
    ]
    released = await r.dispatch(sleep=0.1)
    await r.until(lambda: r.livekit.jobs[released.job_id].ended_at is not None)
    r.kill()
    await r.until(lambda: r.log("stop draining"))
    r.let_go()
    assert await r.exit() == 0
    await r.clean(job, released)
    assert r.fates()[job.job_id] == "finished"


@pytest.mark.alone
async def test_recycle_under_a_stream(run: StartRun, tmp_path: Path) -> None:
    """After so many jobs a worker is replaced, never in the middle of one."""
    config = tmp_path / "lastcall.toml"
    config.write_text("[recycle]\nmax_jobs = 6\n[stall]\nbeat = 0.3\n")
    r: Run = await run("run", "--grace", "60", "--config", str(config), AGENT, environment=IDLE)
    await r.ready()
    async with Stream(r) as stream:
        await r.until(lambda: r.log("recycle done"), 60)
        await stream.some(3)
    await stream.all_ended()
    assert "jobs" in r.log("slot draining")[0]["reason"]
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


@pytest.mark.alone
async def test_hold_and_scale_down_under_a_stream(run: StartRun) -> None:
    """While one of two supervisors' worth of workers is held the server sees it full; released, it serves.

    The worker that goes finishes its jobs; the one that stays takes the rest.
    """
    r: Run = await run("run", "-w", "2", "--grace", "60", AGENT, environment=IDLE)
    await r.ready(2)
    job = await r.dispatch("before", mode="hold")
    await r.job_says(job.job_id, "started")
    os.kill(r.pid, signal.SIGUSR1)
    began = time.monotonic()
    await r.until(lambda: not r.livekit.available(), 1.0)
    refused = await r.livekit.dispatch("held")
    assert refused.outcome == "no_worker"
    assert (await status(r))["held"] and time.monotonic() - began < 30
    await verb(r, "release")
    await r.ready(2)
    r.let_go()
    async with Stream(r) as stream:
        await stream.some(5)
        await verb(r, "scale", "1", "--wait", timeout=60)
        await stream.some(3)
    await stream.all_ended()
    await status_when(r, lambda document: len(document["slots"]) == 1)
    r.kill()
    assert await r.exit() == 0
    await r.clean(job)


@pytest.mark.core
async def test_cap_is_exact_under_simultaneous_offers(run: StartRun, tmp_path: Path) -> None:
    """Of ten offers at once two are taken; when one ends there is room for one, and the server knows."""
    config = tmp_path / "lastcall.toml"
    config.write_text("[jobs]\nmax_running = 2\n")
    r: Run = await run("run", "--grace", "60", "--config", str(config), AGENT, environment=IDLE)
    await r.ready()
    spec = json.dumps({"mode": "hold"})
    results = await asyncio.gather(*(r.livekit.dispatch(f"r{n}", metadata=spec) for n in range(10)))
    taken = [result for result in results if result.outcome == "assigned"]
    assert len(taken) == 2, results
    await r.until(lambda: not r.livekit.available())
    for result in taken:
        await r.job_says(result.job_id, "started")
    r.let_go()
    await r.ready()
    again = await r.dispatch("again", sleep=0.1)
    await r.job_says(again.job_id, "ended")
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


async def test_reloads_that_fail(run: StartRun, tmp_path: Path) -> None:
    """Each reload fails with the reason, and the old worker keeps serving.

    No process of the new worker gets ready for a job, and it is given up after start.timeout. The code on
    disk no longer loads, and the reason is the user's own error. The new worker is killed while it warms.
    """
    config, target = tmp_path / "lastcall.toml", tmp_path / "app.py"
    config.write_text("[start]\ntimeout = 8\n")
    target.write_text(Path(AGENT).read_text())
    r: Run = await run("run", "--grace", "60", "--config", str(config), str(target))
    await r.ready()

    async def serves() -> None:
        job = await r.dispatch(sleep=0.1)
        await r.job_says(job.job_id, "ended")
        assert {e.worker_id for e in r.events("accepted")} == {r.log("slot ready")[0]["worker_id"]}

    # The process that waits for a job is one of before these changes, and no job takes it meanwhile.
    slow = r.slow_down()
    said = await verb(r, "reload", "--wait", code=1, timeout=60)
    assert "not registered within 8 s" in said  # livekit-agents waits 12 s for a process before it registers
    slow.unlink()
    target.write_text("def broken(:\n")
    said = await verb(r, "reload", "--wait", code=1, timeout=60)
    assert "the old program keeps serving" in said and "SyntaxError" in said
    target.write_text(Path(AGENT).read_text())
    await serves()

    starts = len(r.log("slot starting"))
    reloading = asyncio.create_task(verb(r, "reload", "--wait", code=1, timeout=60))
    await r.until(lambda: len(r.log("slot starting")) == starts + 1, START)
    psutil.Process(r.log("slot starting")[-1]["pid"]).kill()
    assert "killed by SIGKILL" in await reloading
    await serves()
    assert not [each for each in r.log("slot draining") if each["generation"] == 1]
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


@pytest.mark.core
async def test_workers_that_drain_by_themselves(run: StartRun) -> None:
    """A SIGTERM to one worker's pid: another takes over while the jobs of the first go on to their end.

    A worker that lost its server gives up. Another takes its place when the server is back, its job is kept
    to its end.
    """
    r: Run = await run("run", "--grace", "60", AGENT, environment={"MAX_RETRY": "1"})
    await r.ready()
    first = await r.dispatch(mode="hold")
    await r.job_says(first.job_id, "started")
    (signalled,) = r.workers()
    signalled.terminate()
    await r.until(lambda: len(r.log("slot ready")) == 2, 30)
    await r.ready()
    assert signalled.is_running()
    r.let_go()
    await r.until(lambda: r.livekit.jobs[first.job_id].status == "JS_SUCCESS")
    await r.until(lambda: not lives(signalled.pid))

    r.hold_on()
    second = await r.dispatch(mode="hold")
    note = await r.job_says(second.job_id, "started")
    draining = len(r.log("slot draining"))
    r.livekit.refuse_connections = True
    await r.livekit.cut_connections()
    await r.until(lambda: len(r.log("slot draining")) > draining, 60)
    r.livekit.refuse_connections = False
    await r.ready()
    assert lives(note["pid"])
    r.let_go()
    await r.job_says(second.job_id, "ended")
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()
