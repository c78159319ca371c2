"""The memory of jobs: each may have a limit, and the kernel finds the processes in order."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from lastcall.worker import job_memory
from lastcall.worker.base import memory
from lastcall.worker.base.budget import Shares
from lastcall.worker.base.calls_over import CallsOver
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.wire import JobCut, JobEnded
from lastcall.worker.engine import Engine
from lastcall.worker.jobs import Job, Jobs
from tests.support.harness import AGENT, Run, StartRun, lives

LIMIT_MB = 300
# A process that holds 60 MB alone, and reads 40 MB of a file.
HOLDER = """
import mmap, sys
held = b"x" * (60 << 20)
file = open(sys.argv[1], "rb")
read = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(read[::4096])
print("up", flush=True)
sys.stdin.read()
"""


@pytest.mark.long
@pytest.mark.core
async def test_job_over_its_limit_ends_alone(run: StartRun, tmp_path: Path) -> None:
    """Jobs that leak are asked to end, and those that do not are killed; the worker's other job goes on.

    On the way: the order in which the kernel would kill, from the workers over the jobs to their programs.
    """
    config = tmp_path / "lastcall.toml"
    config.write_text(f"[jobs]\nmemory_mb = {LIMIT_MB}\n")
    r: Run = await run("run", "--grace", "60", "--config", str(config), AGENT, environment={"IDLE": "3"})
    await r.ready()
    good = await r.dispatch("good", mode="hold")
    leak = await r.dispatch("leak", mode="leak", mb=LIMIT_MB * 9 // 10)
    program = await r.dispatch("program", mode="leaking_program")
    hungry = await r.dispatch("hungry", mode="blocking_leak", mb=2 * LIMIT_MB)
    leaking = await r.job_says(program.job_id, "leaks")
    started = await r.job_says(good.job_id, "started")

    base = memory.oom_adjustment()
    (worker,) = r.workers()
    assert [memory.oom_adjustment(pid) for pid in (r.pid, worker.pid)] == [base, base]
    assert memory.oom_adjustment(psutil.Process(started["pid"]).ppid()) == base, "the forkserver"
    assert memory.oom_adjustment(started["pid"]) == base + 50
    await r.until(lambda: memory.oom_adjustment(leaking["child"]) == base + 100)

    for job in (leak, program, hungry):
        # livekit-agents lets the entrypoint of a job that was asked go on for 15 s, since 1.8.
        await r.until(lambda job=job: r.livekit.jobs[job.job_id].status != "JS_RUNNING", 60)  # type: ignore[misc]
    await r.until(lambda: not lives(leaking["child"]))
    said = {
        job.job_id: [note["what"] for note in r.notes() if note["job"] == job.job_id]
        for job in (leak, hungry)
    }
    assert "callback" in said[leak.job_id], "the shutdown callbacks of a job that was asked have run"
    assert "callback" not in said[hungry.job_id]
    assert r.livekit.jobs[hungry.job_id].status == "JS_FAILED"
    lines = [json.loads(line) for line in r.out.read_text().splitlines() if "for its memory" in line]
    asked, killed = (
        {line["job_id"] for line in lines if f"job is {what}" in line["message"]}
        for what in ("asked", "killed")
    )
    assert asked == {leak.job_id, program.job_id, hungry.job_id}
    # Before 1.8 a job that was asked ends at once, and its program is killed after it.
    assert {hungry.job_id} <= killed <= {hungry.job_id, program.job_id}

    assert r.livekit.jobs[good.job_id].status == "JS_RUNNING" and lives(worker.pid)
    r.kill()
    r.let_go()
    assert await r.exit() == 0
    await r.clean(good)
    totals = r.receipt()["totals"]
    assert (totals["failed"], totals["finished"], totals["cut"]) == (3, 1, 0)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    file = tmp_path / "model"
    file.write_bytes(b"x" * (40 << 20))
    words = [sys.executable, "-c", HOLDER, str(file)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_private_memory(holder: subprocess.Popen[str]) -> None:
    """Memory that ends with the process counts; pages of a file, which the kernel can drop, do not."""
    alone, at_most = memory.held_alone(holder.pid), memory.held_at_most(holder.pid)
    assert 60 << 20 < alone <= at_most < 90 << 20
    assert memory.held_alone(2**22 + 1) == memory.held_at_most(2**22 + 1) == 0


def test_descendants(holder: subprocess.Popen[str]) -> None:
    """All of them at any depth, by parent; a process that is not there has none."""
    processes = memory.all_processes()
    found = memory.below([os.getpid(), 1, holder.pid, 2**22 + 1], processes)
    assert processes[holder.pid] in found[os.getpid()]
    assert found[holder.pid] == found[2**22 + 1] == []


@pytest.mark.parametrize("has_lists", [True, False])
def test_descendants_are_found_without_the_other_processes(
    has_lists: bool, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's lists of children lead to the descendants; all processes are read only without lists."""
    if not memory.CHILDREN.exists():
        pytest.skip("this kernel has no lists of children")
    reads: list[str] = []
    read_all = memory.all_processes

    def all_processes() -> dict[int, memory.Process]:
        reads.append("all")
        return read_all()

    monkeypatch.setattr(memory, "all_processes", all_processes)
    if not has_lists:
        monkeypatch.setattr(memory, "CHILDREN", Path("/proc/no-such-file"))
    found = memory.processes_below([os.getppid(), os.getpid(), holder.pid, 2**22 + 1])
    own = memory.process_of(holder.pid)
    assert own is not None and own.parent == os.getpid()
    assert own in found[os.getpid()] and own in found[os.getppid()]
    assert found[holder.pid] == found[2**22 + 1] == []
    assert reads == ([] if has_lists else ["all"])


def test_only_the_same_process_is_killed(holder: subprocess.Popen[str]) -> None:
    """A pid that was given to a later process is left alone."""
    same = memory.process_of(holder.pid)
    assert same is not None
    memory.kill_if_same(memory.Process(pid=same.pid, parent=same.parent, started=same.started - 1))
    assert lives(holder.pid)
    memory.kill_if_same(same)
    assert holder.wait(30) == -9
    memory.kill_if_same(memory.Process(pid=2**22 + 1, parent=1, started=1))


def test_a_lack_is_not_an_end(holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a free descriptor nothing is known, and a process does not count as gone or empty."""

    def lack(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_text", lack)
    monkeypatch.setattr(Path, "read_bytes", lack)
    for look in (memory.process_of, memory.held_at_most, memory.held_alone):
        with pytest.raises(OSError, match="Too many"):
            look(holder.pid)


@pytest.mark.parametrize(
    ("now", "asked", "then"), [(0, 50, 50), (60, 50, 60), (970, 1020, 999), (1000, 1050, 1000)]
)
def test_order_is_only_raised(holder: subprocess.Popen[str], now: int, asked: int, then: int) -> None:
    """No value is lowered, and none is raised to 1000."""
    Path(f"/proc/{holder.pid}/oom_score_adj").write_text(str(now))
    memory.die_before(asked, holder.pid)
    assert memory.oom_adjustment(holder.pid) == then
    with contextlib.suppress(FileNotFoundError):
        memory.die_before(asked, 2**22 + 1)


def test_time_to_end() -> None:
    """A job that is asked for its memory has no less than in a stop, and the page says how long."""
    assert Shares().jobs_close < job_memory.ENDS_WITHIN
    page = (Path(__file__).parents[1] / "docs" / "memory.md").read_text()
    assert f"At the limit, or {job_memory.ENDS_WITHIN:g} s after it was" in page


class FakeExecutor:
    """A job process, as livekit-agents would hold it; closes are counted."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.closes = 0

    async def aclose(self) -> None:
        self.closes += 1


@pytest.mark.core
async def test_a_stop_does_not_cut_a_job_that_was_ended_for_its_memory(
    holder: subprocess.Popen[str],
) -> None:
    """Such a job is not asked again and never counts as cut, also when the close has to kill it."""
    said: list[Any] = []

    async def queue(_message: Any) -> None:
        pass

    engine = Engine(
        SimpleNamespace(_request_fnc=None, _queue_msg=queue),
        changed=Condition(),
        must_refuse=lambda: False,
        report=said.append,
        calls_over=CallsOver(),
    )
    executor = FakeExecutor(holder.pid)
    engine.jobs.launch("a", executor, SimpleNamespace(id="a", room=SimpleNamespace(name="r"), dispatch_id=""))
    (job,) = engine.jobs
    job.over_memory = True
    await engine.end_jobs(now() + 0.1, now() + 0.2)
    assert holder.wait(30) == -9
    assert executor.closes == 0
    assert not [message for message in said if isinstance(message, JobCut)]
    assert [message.fate for message in said if isinstance(message, JobEnded)] == ["failed"]
    assert engine.jobs.cut == 0


def the_job(jobs: Jobs, pid: int) -> Job:
    jobs.launch(
        "a", FakeExecutor(pid), SimpleNamespace(id="a", room=SimpleNamespace(name="r"), dispatch_id="")
    )
    return jobs.running[0]


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.01)


async def test_the_watch_outlives_a_lack(
    holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A look that fails is followed by others; a job that was asked is killed on time without any look."""
    for name in ("LOOK_AGAIN", "LOOK_EVERY", "LOOK_OFTEN"):
        monkeypatch.setattr(job_memory, name, 0.01)
    monkeypatch.setattr(job_memory, "ENDS_WITHIN", 0.5)
    with subprocess.Popen(["sleep", "600"]) as program:
        left = memory.process_of(program.pid)
        assert left is not None
        lacks: list[Exception] = [
            OSError(errno.EMFILE, "Too many open files"),
            OSError(errno.EMFILE, "Too many open files"),
            MemoryError(),
            PermissionError(errno.EPERM, "Operation not permitted"),
        ]
        asked: list[Job] = []
        killers: list[str] = []

        def see(pids: list[int]) -> dict[int, list[memory.Process]]:
            if lacks:
                raise lacks.pop(0)
            if asked:
                raise OSError(errno.ENFILE, "File table overflow")
            return {pid: [left] for pid in pids}

        def kill_if_same(process: memory.Process) -> None:
            killers.append(threading.current_thread().name)
            memory.kill_if_same(process)

        async def ask(job: Job, _due_at: float) -> None:
            asked.append(job)
            raise ValueError("the pipe is broken")

        start, starts = threading.Thread.start, []

        def no_thread_at_first(thread: threading.Thread) -> None:
            starts.append(thread)
            if len(starts) == 1:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(job_memory, "processes_below", see)
        monkeypatch.setattr(job_memory, "kill_if_same", kill_if_same)
        monkeypatch.setattr(threading.Thread, "start", no_thread_at_first)
        changed = Condition()
        jobs = Jobs(changed, lambda message: None)
        job = the_job(jobs, holder.pid)
        watch = job_memory.MemoryWatch(
            jobs,
            changed,
            limit=70 << 20,
            ask=ask,
            kill=lambda job: os.kill(job.pid or 0, 9),
            is_ending=lambda job: False,
        )
        running = asyncio.create_task(watch.run())
        await until(lambda: program.poll() is not None)
        assert asked == [job] and job.was_killed and job.over_memory
        assert holder.wait(30) == program.returncode == -9
        assert all(name.startswith("job-memory") for name in killers)
        assert not running.done()
        running.cancel()
        await asyncio.wait([running])
    failures = [record.exc_info[1] for record in caplog.records if record.exc_info]
    kinds = [type(error) for error in failures]
    assert sorted(kind.__name__ for kind in kinds) == [
        "MemoryError", "OSError", "OSError", "PermissionError", "RuntimeError", "ValueError",
    ]  # fmt: skip


async def test_a_job_that_ends_by_itself_is_not_asked(
    holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job in its shutdown callbacks may pass 80 % and be finished. At the limit it is killed."""
    monkeypatch.setattr(job_memory, "LOOK_OFTEN", 0.01)
    looks: list[int] = []

    def held_alone(pid: int) -> int:
        looks.append(pid)
        return memory.held_alone(pid)

    monkeypatch.setattr(job_memory, "held_alone", held_alone)
    changed = Condition()
    jobs = Jobs(changed, lambda message: None)
    job = the_job(jobs, holder.pid)

    async def ask(job: Job, _due_at: float) -> None:
        raise AssertionError(job)

    for limit_mb in (70, 50):
        watch = job_memory.MemoryWatch(
            jobs,
            changed,
            limit=limit_mb << 20,
            ask=ask,
            kill=lambda job: os.kill(job.pid or 0, 9),
            is_ending=lambda job: True,
        )
        running = asyncio.create_task(watch.run())
        if limit_mb == 70:
            await until(lambda: len(looks) > 3)
            assert lives(holder.pid) and not job.was_killed
            job.exit_code = 0
            assert job.fate == "finished"
        else:
            await until(lambda: job.was_killed)
            assert holder.wait(30) == -9
        running.cancel()
        await asyncio.wait([running])
        assert not job.over_memory
