"""A stop, however it is sent, cuts no job. Real workers, real signals, a real dispatch protocol."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from importlib import metadata
from pathlib import Path

import pytest

from lastcall.worker.base.budget import entrypoint_wait
from tests.support.harness import AGENT, Run, StartRun, lives
from tests.support.metrics import Samples, scrape

pytestmark = pytest.mark.core


async def test_sigterm_to_the_supervisor(run: StartRun) -> None:
    """Two workers with jobs: both are FULL at once, the jobs end by themselves, the receipt lists them.

    SIGSTOP and SIGCONT of the supervisor harm nobody; a SIGTERM in between takes effect afterwards.
    """
    r: Run = await run("run", "-w", "2", "--grace", "40", AGENT)
    await r.ready(2)
    jobs = [await r.dispatch(f"room-{n}", mode="hold") for n in range(4)]
    for job in jobs:
        await r.job_says(job.job_id, "started")
    os.kill(r.pid, signal.SIGSTOP)
    await asyncio.sleep(1.5)
    r.kill()
    os.kill(r.pid, signal.SIGCONT)
    await r.until(lambda: not r.livekit.available())
    refused = await r.livekit.dispatch("too late")
    assert refused.outcome == "no_worker"
    r.let_go()
    assert await r.exit() == 0
    await r.clean(*jobs)
    assert set(r.fates()) == {job.job_id for job in jobs}
    assert r.receipt()["totals"]["finished"] == 4


async def test_sigterm_to_the_process_groups(run: StartRun) -> None:
    """The signal reaches forkserver and jobs as well, which would cut every job of a bare worker."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=2.5)
    await r.job_says(job.job_id, "started")
    r.kill_group()
    assert await r.exit() == 0
    await r.clean(job)


async def test_sigterm_to_every_process(run: StartRun) -> None:
    """A stop of the whole cgroup, as systemd's default KillMode sends it."""
    r: Run = await run("run", "-w", "2", "--grace", "40", AGENT)
    await r.ready(2)
    jobs = [await r.dispatch(f"room-{n}", mode="hold") for n in range(3)]
    for job in jobs:
        await r.job_says(job.job_id, "started")
    r.kill_all()
    await r.until(lambda: not r.livekit.available())
    r.let_go()
    assert await r.exit() == 0
    await r.clean(*jobs)


async def test_sigterm_twice(run: StartRun) -> None:
    """A second SIGTERM, to everybody, changes nothing: in the fence, right after it, or in the drain."""
    pauses = (0.01, 0.2, 1.8)
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=sum(pauses) + 2)
    await r.job_says(job.job_id, "started")
    r.kill()
    for pause in pauses:
        await asyncio.sleep(pause)
        r.kill_all()
    assert await r.exit() == 0
    await r.clean(job)


@pytest.mark.parametrize("numbers", [(signal.SIGHUP,), (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN)])
async def test_other_signals_to_every_process(run: StartRun, numbers: tuple[signal.Signals, ...]) -> None:
    """A signal with a meaning for the supervisor has none for a worker or a job, and cuts nothing."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    job = await r.dispatch(mode="hold")
    note = await r.job_says(job.job_id, "started")
    (worker,) = r.workers()
    for number in numbers:
        r.kill_all(number)
        await asyncio.sleep(0.3)  # time to die in
        assert lives(worker.pid) and lives(note["pid"]), number
    r.signalled_at = 0.0
    r.kill_all()
    for number in numbers:
        r.kill_all(number)
    r.let_go()
    assert await r.exit() == 0
    await r.clean(job)


async def test_sigint_without_a_terminal(run: StartRun) -> None:
    """Nomad and Fly send SIGINT: it drains as SIGTERM does, also when it comes again."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=2.5)
    await r.job_says(job.job_id, "started")
    for _ in range(3):
        r.kill_all(signal.SIGINT)
        await asyncio.sleep(0.4)
    assert await r.exit() == 0
    await r.clean(job)
    assert r.receipt()["reason"] == "SIGINT"


async def test_sigterm_while_the_loop_is_half_busy(run: StartRun) -> None:
    """Callbacks that fill half of the worker's loop delay the fence by milliseconds, not for ever."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=2.5, busy=True)
    await r.job_says(job.job_id, "started")
    r.kill_all()
    assert await r.exit() == 0
    await r.clean(job)


async def test_sigterm_while_request_fnc_blocks_the_loop(run: StartRun) -> None:
    """A blocked loop has not seen the signal when its accept() comes; the gate makes it look first."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    first = await r.dispatch("first", sleep=3)
    await r.job_says(first.job_id, "started")
    r.livekit.answer_timeout = 8
    late = asyncio.create_task(r.livekit.dispatch("late", metadata='{"request_block": 2.5, "sleep": 1}'))
    await r.until(lambda: len(r.events("offer")) == 2)
    await asyncio.sleep(0.3)
    r.kill()
    assert (await late).outcome == "no_worker"
    assert await r.exit() == 0
    await r.clean(first)
    receipt = r.receipt()
    assert receipt["fence_unacknowledged"] in ([], [0])
    assert [e.job_id for e in r.events("accepted")] == [first.job_id]


async def test_offer_unanswered_at_the_fence_is_refused(run: StartRun) -> None:
    """The user's request_fnc accepts after the fence: the server hears no, at once."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    r.livekit.answer_timeout = 8
    pending = asyncio.create_task(r.livekit.dispatch("pending", metadata='{"request_sleep": 1, "sleep": 1}'))
    await r.until(lambda: r.events("offer"))
    r.kill()
    assert (await pending).outcome == "no_worker"
    assert await r.exit() == 0
    assert r.events("accepted") == []
    await r.clean()


async def test_job_between_availability_and_assignment(run: StartRun) -> None:
    """The yes was sent before the signal, the assignment comes after it: the job runs to its end."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    r.livekit.hold_assignments = 1.5
    dispatching = asyncio.create_task(r.dispatch(sleep=1.5))
    await r.until(lambda: r.events("accepted"))
    r.kill_all()
    job = await dispatching
    assert await r.exit() == 0
    await r.clean(job)
    assert r.fates() == {job.job_id: "finished"}


async def test_assignment_that_never_comes(run: StartRun) -> None:
    """An accepted offer that the server gave up is no job: the stop waits as long as livekit does."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    r.livekit.hold_assignments = 60
    dispatching = asyncio.create_task(r.livekit.dispatch("never", metadata='{"sleep": 1}'))
    await r.until(lambda: r.events("accepted"))
    r.kill()
    assert await r.exit(20) == 0
    dispatching.cancel()
    assert r.fates() == {}
    assert r.receipt()["totals"]["unassigned"] == 1
    await r.clean()


async def test_idle_worker(run: StartRun) -> None:
    """Nothing to drain: the fence is told all the same, and the end comes at once."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    r.kill()
    assert await r.exit() == 0
    assert [e.at for e in r.events("full") if e.at >= r.signalled_at]
    await r.clean()
    assert r.receipt()["seconds"] < 10, "grace is 40 s"


@pytest.mark.alone
async def test_deadline_shorter_than_the_job(run: StartRun) -> None:
    """The stop ends within grace, whatever a job does. Each job's end is reported, and the code is 75."""
    r: Run = await run("run", "--grace", "8", AGENT)
    await r.ready()
    modes = ("sleep", "swallow", "block")
    jobs = {mode: await r.dispatch(mode, sleep=60, mode=mode) for mode in modes}
    for job in jobs.values():
        await r.job_says(job.job_id, "started")
    began = time.monotonic()
    r.kill_all()
    assert await r.exit() == 75
    assert time.monotonic() - began < 8 + 2
    receipt = r.receipt()
    assert receipt["seconds"] <= 8.5
    assert (receipt["outcome"], receipt["left"]) == ("cut", 0)
    assert r.fates() == {job.job_id: "cut" for job in jobs.values()}
    for mode, job in jobs.items():
        record = r.livekit.jobs[job.job_id]
        # Older versions report a job that ends when it is asked to as a success; one that is killed never is.
        reported = {"JS_FAILED"} if mode == "block" else {"JS_FAILED", "JS_SUCCESS"}
        assert record.status in reported and not record.forgotten, (mode, r.logs())
    await r.nothing_left()


@pytest.mark.alone
async def test_deadline_before_the_job_has_a_process(run: StartRun) -> None:
    """A job whose process is still starting when the grace is over is cut, and the server is told."""
    r: Run = await run("run", "--grace", "6", AGENT)
    await r.ready()
    r.slow_down()
    first = await r.dispatch("has the warm process", sleep=0.1)
    await r.job_says(first.job_id, "ended")
    job = await r.dispatch("has none")
    r.kill_all()
    assert await r.exit() == 75
    assert r.fates()[job.job_id] == "cut"
    record = r.livekit.jobs[job.job_id]
    assert (record.status, record.forgotten) == ("JS_FAILED", False), r.logs()
    await r.nothing_left()


async def test_request_fnc_that_answers_twice_and_one_that_does_not_return(run: StartRun) -> None:
    """A request_fnc that accepts twice has one job; the stop waits for it to its end.

    A request_fnc that still runs when its job is over does not hold up the end.
    """
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    twice = await r.dispatch("twice", mode="hold", accepts=2)
    lingers = await r.dispatch("lingers", mode="hold", request_linger=600)
    for job in (twice, lingers):
        await r.job_says(job.job_id, "started")
    await r.until(lambda: "second answer to one offer is ignored" in r.out.read_text())
    r.kill_all()
    await r.until(lambda: not r.livekit.available())
    r.let_go()
    assert await r.exit() == 0
    await r.clean(twice, lingers)
    assert [event.job_id for event in r.events("accepted")] == [twice.job_id, lingers.job_id]
    assert r.receipt()["totals"]["unassigned"] == 0


async def test_worker_killed_with_jobs(run: StartRun) -> None:
    """SIGKILL of a worker: its jobs are lost and counted, another is started, the stop later is clean."""
    r: Run = await run("run", "--grace", "20", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=60)
    note = await r.job_says(job.job_id, "started")
    (worker,) = r.workers()
    worker.kill()
    await r.until(lambda: not r.livekit.available())
    await r.ready()
    await r.until(lambda: not lives(note["pid"]))
    r.kill()
    assert await r.exit() == 0
    receipt = r.receipt()
    assert receipt["totals"]["lost"] == 1
    assert receipt["jobs"] == []
    await r.nothing_left()


async def test_supervisor_killed_with_jobs(run: StartRun) -> None:
    """SIGKILL of the supervisor: each worker drains by itself, its jobs' prints included, and ends."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=3, prints=200)
    await r.job_says(job.job_id, "started")
    r.kill(signal.SIGKILL)
    await r.job_says(job.job_id, "ended")
    await r.until(lambda: r.livekit.jobs[job.job_id].status == "JS_SUCCESS")
    await r.nothing_left(10)
    assert r.accepted_late() == []


async def test_programs_of_a_crashed_worker(run: StartRun) -> None:
    """The same, when the worker is killed: swept at once, while the slot lives on.

    SIGQUIT waits for nothing, and the receipt says what was cut.
    """
    r: Run = await run("run", "-w", "2", "--grace", "40", AGENT)
    await r.ready(2)
    jobs = [await r.livekit.dispatch(f"r{n}", metadata='{"sleep": 60, "mode": "spawn"}', only=w.id)
            for n, w in enumerate(r.livekit.available())]  # fmt: skip
    children = [(await r.job_says(job.job_id, "spawned"))["child"] for job in jobs]
    victim = next(w for w in r.workers() if children[0] in {c.pid for c in w.children(recursive=True)})
    victim.kill()
    await r.until(lambda: not lives(children[0]))
    assert lives(children[1]), "another slot's program was swept"
    await r.until(lambda: r.log("slot failed"))  # its job is written down as lost, before the stop
    began = time.monotonic()
    r.kill(signal.SIGQUIT)
    assert await r.exit() == 75
    assert time.monotonic() - began < 10, "grace is 40 s"
    assert r.fates() == {jobs[1].job_id: "cut"}
    await r.nothing_left()


async def test_connection_cut_during_the_drain(run: StartRun) -> None:
    """The worker reconnects while its job goes on, and takes nothing new."""
    r: Run = await run("run", "--grace", "40", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=4)
    await r.job_says(job.job_id, "started")
    r.kill()
    await r.until(lambda: not r.livekit.available())
    await r.livekit.cut_connections()
    await r.until(lambda: len(r.events("registered")) == 2)
    while r.process.poll() is None:
        result = await r.livekit.dispatch("new", metadata='{"sleep": 1}')
        assert result.outcome == "no_worker"
        await asyncio.sleep(0.02)
    assert r.process.returncode == 0
    await r.job_says(job.job_id, "ended")
    assert [e.job_id for e in r.events("accepted")] == [job.job_id]
    assert r.fates() == {job.job_id: "finished"}
    await r.nothing_left()


async def test_jobs_that_crash_and_programs_that_jobs_left_behind(run: StartRun) -> None:
    """A process that ends with an error: reported so to the server, counted so, no reason for 75.

    Such a job is failed and not lost, and good ones are neither. The forkserver's exit status is read once:
    without the lock about one good job in forty is FAILED. The shield ends at exec: what a job starts is
    ended by SIGTERM as ever. The job collects garbage.

    A program that a job left in a new session, and that ignores SIGTERM, is swept and counted, and is no
    reason for 75. A child that a job has forked holds the job's pipes for longer than the job. The job is
    over all the same.
    """
    r: Run = await run("run", "--grace", "40", AGENT, environment={"IDLE": "2"})
    await r.ready()
    crashed = await r.dispatch(mode="crash")
    await r.until(lambda: r.livekit.jobs[crashed.job_id].status == "JS_FAILED")
    starter = await r.dispatch(sleep=0.1, mode="program")
    note = await r.job_says(starter.job_id, "program")
    assert note["code"] == -signal.SIGTERM
    assert note["collects_after"] == gc.get_threshold()[0]
    jobs = []
    for n in range(12):
        jobs.append(await r.dispatch(f"room-{n}", sleep=0.05))
        await r.until(lambda: r.livekit.jobs[jobs[-1].job_id].status != "JS_RUNNING", 15)
    statuses = [r.livekit.jobs[job.job_id].status for job in jobs]
    assert statuses == ["JS_SUCCESS"] * len(jobs)
    await r.until(lambda: r.livekit.jobs[starter.job_id].status == "JS_SUCCESS")
    spawns = await r.dispatch("spawns", sleep=1, mode="spawn")
    program = (await r.job_says(spawns.job_id, "spawned"))["child"]
    await r.job_says(spawns.job_id, "ended")
    forks = await r.dispatch("forks", sleep=1, mode="fork")
    child = (await r.job_says(forks.job_id, "forked"))["child"]
    r.kill()
    assert await r.exit(25) == 0
    await r.clean(spawns, forks)
    assert r.receipt()["totals"]["failed"] == 1
    # A fork looks like one of the forkserver: it is swept, and not counted.
    assert r.receipt()["swept"] == 1
    assert not lives(program) and not lives(child)


@pytest.mark.long
async def test_what_calls_get_of_a_minute(run: StartRun) -> None:
    """A call that ends 33 s into a grace of 60 s is not told to; one that goes on has its callbacks run."""
    r: Run = await run("run", "--grace", "60", "--http", "127.0.0.1:0", AGENT)
    await r.ready()
    long = await r.dispatch("long", sleep=33)
    # Between the cut and its end there is time for a look: newer versions give the entrypoint 15 s.
    after = 0 if entrypoint_wait(metadata.version("livekit-agents")) else 4
    endless = await r.dispatch("endless", mode="hold", after=after)
    for job in (long, endless):
        await r.job_says(job.job_id, "started")
    r.kill()
    await r.until(lambda: r.log("stop draining"))
    draining = await scrape(r)
    assert draining.value("lastcall_jobs_to_cut") == 2
    assert 0 < draining.value("lastcall_drain_left_seconds") <= 37
    assert draining.value("lastcall_jobs_cut_total") == 0
    await r.until(lambda: r.log("stop closing"), 40)
    async with asyncio.timeout(10):
        while (closing := await scrape(r)).value("lastcall_jobs_cut_total") == 0:
            await asyncio.sleep(0.1)
    assert closing.value("lastcall_jobs_cut_total") == closing.value("lastcall_jobs_finished_total") == 1
    assert closing.value("lastcall_jobs_running") == 1, "the job is counted as cut before it has ended"
    assert closing.value("lastcall_jobs_to_cut") == closing.value("lastcall_drain_left_seconds") == 0
    assert closing.value("lastcall_drain_seconds_count") == 0, "the worker has not drained: it gave up"
    assert await r.exit(62) == 75
    assert r.fates() == {long.job_id: "finished", endless.job_id: "cut"}
    assert [note["job"] for note in r.notes() if note["what"] == "callback"] == [long.job_id, endless.job_id]
    receipt = r.receipt()
    assert receipt["phases"]["draining"] == pytest.approx(37, abs=1) and receipt["killed"] == []
    assert r.livekit.jobs[endless.job_id].ended_at is not None, "the server was told"
    last = Samples.of(Path(f"{r.receipt_file}.prom").read_text())
    assert last.value("lastcall_last_stop_jobs", fate="cut", receipt=str(r.receipt_file)) == 1
    assert last.value("lastcall_last_stop_exit_code") == 75
    await r.nothing_left()
