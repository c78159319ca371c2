"""Accidents beside a stop: a forkserver killed, a worker frozen, odd settings of a launcher."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import psutil
import pytest

from lastcall.worker.jobs import EXIT_WITHIN
from tests.support.freezer import Freezer
from tests.support.harness import AGENT, Run, StartRun, lives

pytestmark = pytest.mark.core


def forkserver(r: Run) -> psutil.Process:
    (worker,) = r.workers()
    found = [p for p in worker.children() if "forkserver" in " ".join([p.name(), *p.cmdline()])]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def freezer() -> Iterator[Freezer]:
    if not Freezer.is_there():
        pytest.skip("no cgroup v1 freezer that this user may write to")
    with Freezer() as freezer:
        yield freezer


async def test_forkserver_killed_in_a_stop(run: StartRun) -> None:
    """The job lives on to its end, and has ended well for the server too."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    job = await r.dispatch(mode="hold")
    note = await r.job_says(job.job_id, "started")
    server = forkserver(r)
    r.kill()
    await r.until(lambda: r.log("stop draining"))
    await lives_on(r, server, note["pid"])
    r.let_go()
    await r.job_says(job.job_id, "ended")
    await r.job_says(job.job_id, "callback")
    assert await r.exit() == 0
    assert r.receipt()["totals"]["finished"] == 1
    assert r.livekit.jobs[job.job_id].status == "JS_SUCCESS"
    assert r.receipt()["totals"]["cut"] == r.receipt()["totals"]["lost"] == 0
    await r.nothing_left()


async def lives_on(r: Run, server: psutil.Process, pid: int) -> None:
    """Kill the forkserver, and assert that a job process does not end with it.

    By itself livekit-agents closes the job's channels then, and the job ends in the middle.
    """
    server.kill()
    await r.until(lambda: not lives(server.pid))
    await asyncio.sleep(1.0)  # time to end in
    assert lives(pid)


async def test_forkserver_is_replaced_and_shielded(run: StartRun) -> None:
    """A job of the killed one lives on, into a stop and to its end, and has ended well for the server too.

    Jobs after it are run by another, which a stop that reaches every process does not reach either.
    """
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    before = await r.dispatch(mode="hold")
    note = await r.job_says(before.job_id, "started")
    await lives_on(r, forkserver(r), note["pid"])
    # A process that was warm takes the first one; what is started for the next is of the new forkserver.
    jobs = []
    for _ in range(3):
        await r.until(lambda: bool(r.livekit.available()), 30)
        job = await r.dispatch(mode="hold")
        await r.job_says(job.job_id, "started", 30)
        jobs.append(job)
    r.kill_all()
    await r.until(lambda: r.log("stop draining"))
    r.let_go()
    await r.job_says(before.job_id, "ended")
    await r.job_says(before.job_id, "callback")
    assert await r.exit() == 0
    assert r.fates()[before.job_id] == "finished"
    assert r.receipt()["totals"]["cut"] == r.receipt()["totals"]["lost"] == 0
    for job in (before, *jobs[1:]):
        assert r.livekit.jobs[job.job_id].status == "JS_SUCCESS"
    await r.nothing_left()


async def test_worker_frozen_while_its_last_job_ends(run: StartRun) -> None:
    """Long enough to be given up as stuck; when it goes on, the job has ended by itself and was not cut."""
    r: Run = await run("run", "--grace", "60", AGENT)
    await r.ready()
    job = await r.dispatch(mode="hold")
    note = await r.job_says(job.job_id, "started")
    (worker,) = r.workers()
    r.kill()
    await r.until(lambda: r.log("stop draining"))
    worker.suspend()
    r.let_go()
    await r.until(lambda: not lives(note["pid"]))
    await r.until(lambda: r.log("slot closing"), 20)  # it is silent, and its job is gone
    worker.resume()
    assert await r.exit() == 0
    assert r.livekit.jobs[job.job_id].status == "JS_SUCCESS"
    assert r.fates() == {job.job_id: "finished"}
    await r.nothing_left()


@pytest.mark.parametrize(
    "launch",
    [
        # Ignored signals are inherited: the supervisor would lose every exit status, and the stop.
        "trap '' CHLD TERM INT; exec \"$@\"",
        # No descriptor of the supervisor may take the number of a standard stream.
        'exec "$@" <&- >&- 2>&-',
    ],
)
async def test_odd_launchers(run: StartRun, launch: str) -> None:
    """Signals ignored, standard streams closed: the stop is as ever, and so is its exit code.

    A room's very long name is clipped in status and receipt; its job runs, and is counted once.
    """
    r: Run = await run("run", "--grace", "30", AGENT, prefix=["sh", "-c", launch, "sh"])
    await r.ready()
    far = await r.dispatch("room" * 100_000, sleep=0.1)
    await r.until(lambda: r.livekit.jobs[far.job_id].ended_at is not None)
    job = await r.dispatch(sleep=1)
    await r.job_says(job.job_id, "started")
    r.kill()
    assert await r.exit() == 0
    assert r.receipt()["seconds"] < 15
    assert r.receipt()["totals"]["finished"] == 2
    assert "Traceback" not in r.logs()
    await r.clean(far, job)


async def frozen_idle_process(r: Run, freezer: Freezer) -> psutil.Process:
    """Freeze the one job process that waits for a job; SIGKILL ends it only when it has thawed."""
    server = forkserver(r)
    await r.until(lambda: len(server.children()) == 1)
    (idle,) = server.children()
    freezer.freeze(idle.pid)
    return idle


async def test_process_that_takes_long_to_die(run: StartRun, freezer: Freezer) -> None:
    """Killed in a stop with time enough, and gone before the end: the sweep waits, and nothing is left."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    idle = await frozen_idle_process(r, freezer)
    r.kill()
    await r.until(lambda: r.log("stop sweeping"))
    await asyncio.sleep(2.0)  # time to give up in
    assert r.process.poll() is None and lives(idle.pid)
    freezer.thaw()
    assert await r.exit() == 0
    await r.clean()


@pytest.mark.alone
async def test_process_that_outlives_grace(run: StartRun, freezer: Freezer) -> None:
    """Frozen until grace is over: the stop ends on time, and the receipt counts it as left."""
    r: Run = await run("run", "--grace", "5", AGENT)
    await r.ready()
    idle = await frozen_idle_process(r, freezer)
    r.kill()
    assert await r.exit(8) == 75
    assert lives(idle.pid)
    freezer.thaw()
    receipt = r.receipt()
    assert (receipt["outcome"], receipt["left"]) == ("forced", 1)
    assert receipt["seconds"] < 6
    await r.nothing_left(5)


async def test_program_of_a_crashed_worker_that_takes_long_to_die(run: StartRun, freezer: Freezer) -> None:
    """The slot starts its next worker meanwhile; the program counts once as swept, and never as left."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    job = await r.livekit.dispatch("room", metadata=json.dumps({"sleep": 60, "mode": "spawn"}))
    child = (await r.job_says(job.job_id, "spawned"))["child"]
    freezer.freeze(child)
    (worker,) = r.workers()
    worker.kill()
    await r.until(lambda: not r.livekit.available())
    await r.ready()
    assert lives(child)
    r.kill()
    await r.until(lambda: r.log("stop sweeping"))
    freezer.thaw()
    assert await r.exit() == 0
    receipt = r.receipt()
    assert (receipt["outcome"], receipt["swept"], receipt["left"]) == ("clean", 1, 0)
    await r.nothing_left()


OUTLIVES = ["thread", "to_thread", "exit_handler"]


@pytest.mark.long
async def test_processes_that_outlive_their_calls(run: StartRun) -> None:
    """The call has ended well, and the server hears so; its process is killed after its bound, and noted.

    An exit handler ends another with an error: the call has ended well, and the receipt notes the exit code.
    """
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    jobs = [await r.dispatch(mode, sleep=0.1, mode=mode, held=True) for mode in (*OUTLIVES, "bad_exit")]
    pids = [(await r.job_says(job.job_id, "started"))["pid"] for job in jobs]
    r.kill()
    r.let_go()
    assert await r.exit() == 0
    await r.clean(*jobs)
    entries = {each["id"]: each for each in r.receipt()["jobs"]}
    *outlived, crashed = [entries[job.job_id] for job in jobs]
    assert [each["process"] for each in outlived] == ["killed"] * len(OUTLIVES)
    for each in outlived:
        assert EXIT_WITHIN <= each["seconds"] < 20  # the drain would have ended it then
    assert crashed["process"] == "exit code 3"
    assert not any(lives(pid) for pid in pids)
    for job in jobs:
        told = [event.detail["status"] for event in r.events("job") if event.job_id == job.job_id]
        assert set(told) == {"JS_RUNNING", "JS_SUCCESS"}


@pytest.mark.alone
async def test_process_that_outlives_its_call_and_grace(run: StartRun) -> None:
    """Grace is shorter than the bound: the process is killed within grace, and the call was not cut."""
    r: Run = await run("run", "--grace", "8", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=0.5, mode="thread")
    await r.job_says(job.job_id, "callback")
    r.kill()
    assert await r.exit() == 0
    await r.clean(job)
    receipt = r.receipt()
    assert [each["process"] for each in receipt["jobs"]] == ["killed"]
    assert receipt["seconds"] < 8
    assert "with a grace of 8 s a call that is cut has" in r.logs(), "said at the start"


async def test_worker_killed_while_a_process_outlives_its_call(run: StartRun) -> None:
    """The call had ended: it is not lost with the worker."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=0.5, mode="thread")
    note = await r.job_says(job.job_id, "callback")
    await asyncio.sleep(1.0)  # the worker tells the supervisor in milliseconds
    r.kill()
    (worker,) = r.workers()
    worker.kill()
    await r.exit()
    assert r.fates() == {job.job_id: "finished"}
    assert r.receipt()["totals"]["lost"] == 0
    assert not lives(note["pid"])


async def test_thread_that_outlives_its_call(run: StartRun) -> None:
    """With the thread executor the worker stops to wait for it, and the call was not cut."""
    r: Run = await run("run", "--grace", "40", AGENT, environment={"EXECUTOR": "THREAD"})
    await r.ready()
    job = await r.dispatch(sleep=0.5, mode="to_thread")
    await r.job_says(job.job_id, "ended")
    r.kill()
    assert await r.exit() == 0
    await r.clean(job)
    assert r.receipt()["seconds"] < 30
