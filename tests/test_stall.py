"""Workers whose loop is stuck are seen, shown, replaced, and ended after their jobs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lastcall.supervisor.processes.launch import CONTROL_FD
from tests.support.harness import AGENT, Run, StartRun, lives
from tests.support.program import status, status_when

CONFIG = "[stall]\nbeat = 0.3\nmisses = 4\ngrace = {grace}\n"


def config(tmp_path: Path, grace: float) -> str:
    path = tmp_path / "lastcall.toml"
    path.write_text(CONFIG.format(grace=grace))
    return str(path)


def only_the_second(document: dict[str, Any]) -> bool:
    """Tell whether the second generation is the only one, and serves."""
    return [(s["generation"], s["state"]) for s in document["slots"]] == [(2, "ready")]


@pytest.mark.core
async def test_endless_loop(run: StartRun, tmp_path: Path) -> None:
    """The stack is in the log, another worker serves, the job of the stuck one ends by itself first."""
    r: Run = await run("run", "--grace", "60", "--config", config(tmp_path, 30), AGENT)
    await r.ready()
    job = await r.dispatch(mode="hold")
    note = await r.job_says(job.job_id, "started")
    (stuck,) = r.workers()
    r.livekit.answer_timeout = 0.5
    await r.livekit.dispatch("stick", metadata='{"request_block": 600}')
    await r.until(lambda: r.log("slot stalled"), 20)
    await r.until(lambda: "in request" in r.err.read_text())
    await r.until(lambda: len(r.log("slot ready")) == 2, 30)
    second = r.log("slot ready")[1]["worker_id"]
    # It is registered; the server learns a moment later that it is not FULL.
    await r.until(lambda: second in [peer.id for peer in r.livekit.available()], 20)
    fresh = await r.livekit.dispatch("fresh", metadata='{"sleep": 0.1}', only=second)
    assert fresh.outcome == "assigned"
    assert lives(note["pid"]) and stuck.is_running(), "the job of the stuck worker had time left"
    r.let_go()
    await r.job_says(job.job_id, "ended")
    await r.until(lambda: not lives(stuck.pid) and r.log("slot stopped"), 40)
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


async def test_stopped_worker(run: StartRun, tmp_path: Path) -> None:
    """SIGSTOP to a worker: the log says why no stack is shown. The worker is replaced, then killed."""
    r: Run = await run("run", "--grace", "60", "--config", config(tmp_path, 1), AGENT)
    await r.ready()
    job = await r.dispatch(mode="hold")
    note = await r.job_says(job.job_id, "started")
    (stuck,) = r.workers()
    stuck.suspend()
    await r.until(lambda: r.log("worker is stopped: no stack to show"), 20)
    await r.until(lambda: len(r.log("slot ready")) == 2, 30)
    await r.until(lambda: not lives(stuck.pid) and not lives(note["pid"]), 30)
    document = await status_when(r, only_the_second)
    assert document["totals"]["cut"] == 1
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


async def test_worker_that_recovers(run: StartRun, tmp_path: Path) -> None:
    """Continued before another has taken over, it is kept, and nothing is cut."""
    r: Run = await run("run", "--grace", "60", "--config", config(tmp_path, 30), AGENT)
    await r.ready()
    job = await r.dispatch(mode="hold")
    await r.job_says(job.job_id, "started")
    (worker,) = r.workers()
    worker.suspend()
    await r.until(lambda: r.log("slot stalled"), 20)
    worker.resume()
    # Either it was quicker than its replacement, or it drains behind it; its job goes on in both cases.
    await r.until(lambda: r.log("slot ready")[1:], 30)
    r.let_go()
    await r.job_says(job.job_id, "ended")
    r.kill()
    assert await r.exit() == 0
    assert r.receipt()["totals"]["cut"] == r.receipt()["totals"]["lost"] == 0
    await r.nothing_left()


async def test_stopped_supervisor_and_idle_stuck_worker(run: StartRun, tmp_path: Path) -> None:
    """SIGSTOP of the supervisor for longer than a stall takes: no worker is found stuck.

    An idle worker that is stuck in a stop has no job to wait for: the stop does not spend its grace on the
    worker, and says that it was killed.
    """
    r: Run = await run("run", "--grace", "600", "--config", config(tmp_path, 30), AGENT)
    await r.ready()
    os.kill(r.pid, signal.SIGSTOP)
    await asyncio.sleep(3)  # what is tested is the length of time itself
    os.kill(r.pid, signal.SIGCONT)
    job = await r.dispatch(sleep=2)
    await r.until(lambda: r.livekit.jobs[job.job_id].status == "JS_SUCCESS")
    assert r.log("slot stalled") == []
    await status_when(r, lambda document: document["totals"]["finished"] == 1)
    (stuck,) = r.workers()
    stuck.suspend()
    r.kill()
    assert await r.exit(60) == 75
    receipt = r.receipt()
    assert receipt["fence_unacknowledged"] == [0]
    assert receipt["killed"] and receipt["killed"][0]["what"] == "worker"
    await r.nothing_left()


@pytest.mark.core
async def test_worker_that_is_cut_off(run: StartRun, tmp_path: Path) -> None:
    """Without its control channel it drains by itself, is replaced, and its calls have all of grace."""
    r: Run = await run("run", "--grace", "60", "--config", config(tmp_path, 0.5), AGENT)
    await r.ready()
    first = await r.dispatch(mode="hold", prints=200)
    pid = (await r.job_says(first.job_id, "started"))["pid"]
    (worker,) = r.workers()
    second = await r.dispatch(mode="hold", severs=CONTROL_FD)
    await r.job_says(second.job_id, "started")
    await r.until(lambda: len(r.log("slot ready")) == 2, 40)
    assert [line["reason"] for line in r.log("slot draining")] == ["control channel lost"]
    # Far longer than a stall takes, and the time that the calls of a stalled worker have.
    await asyncio.sleep(4)
    assert lives(pid) and worker.is_running()
    assert r.log("slot stalled") == [] and r.log("fence not acknowledged") == []
    states = {(s["generation"], s["state"]) for s in (await status(r))["slots"]}
    assert states == {(1, "draining"), (2, "ready")}
    r.let_go()
    for each in (first, second):
        await r.job_says(each.job_id, "ended")
    await r.until(lambda: not lives(worker.pid) and r.log("slot stopped"), 40)
    document = await status_when(r, only_the_second)
    assert document["totals"]["finished"] == document["totals"]["started"] >= 1
    # The worker has left its output to the supervisor.
    await r.until(lambda: r.out.read_text().count("x" * 1000) == 200)
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


@pytest.mark.long
@pytest.mark.core
async def test_stop_with_a_worker_that_is_cut_off(run: StartRun, tmp_path: Path) -> None:
    """A stop waits for its calls too, and cuts those that are still there when their time is over.

    The worker does not notice: another socket has the number of its descriptor. It is told by SIGTERM.
    """
    r: Run = await run("run", "--grace", "30", "--config", config(tmp_path, 0.5), AGENT)
    await r.ready()
    job = await r.dispatch(mode="hold")
    await r.job_says(job.job_id, "started")
    r.livekit.answer_timeout = 0.5
    await r.livekit.dispatch("closes", metadata=json.dumps({"closes": CONTROL_FD, "accepts": 0}))
    await r.until(lambda: r.log("worker is cut off: it drains by itself"), 20)
    r.kill()
    await r.job_says(job.job_id, "callback", 60)
    assert await r.exit(60) == 75
    assert r.fates() == {job.job_id: "cut"}
    assert r.receipt()["fence_unacknowledged"] == [] == r.receipt()["killed"]
    await r.nothing_left()
