"""The image: workers that are forked from one process, which has imported for all of them."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from lastcall.supervisor.config import Config
from lastcall.supervisor.config.options import Start
from lastcall.supervisor.errors import SpawnError
from lastcall.supervisor.fleet.restarts import RestartPolicy, Restarts
from lastcall.supervisor.fleet.slot import Slot
from lastcall.supervisor.fleet.states import SlotState
from lastcall.supervisor.fleet.stop_steps import Ending
from lastcall.worker.base import variables
from lastcall.worker.base.budget import Shares, plan
from lastcall.worker.base.clock import now
from lastcall.worker.base.memory import FIRST_TO_DIE, oom_adjustment
from lastcall.worker.base.process import FORKSERVER, IMAGE
from lastcall.worker.sdk import preflight
from lastcall.worker.sdk.scout import package_of
from tests.support.generations import generation_in
from tests.support.harness import AGENT, HERE, Run, StartRun, lives, name_of
from tests.support.program import status, verb

ON = {"LASTCALL_START__IMAGE": "true"}
LISTENS = str(HERE / "agents" / "listens.py")
# Notes each process that imports livekit-agents, with its oom_score_adj, and does what the test wants of
# that import.
IMPORTS = """
import os, sys, threading, time

class Noted:
    def find_spec(self, name, path=None, target=None):
        if name == "livekit.agents":
            with open(os.environ["IMPORTS"], "a") as file:
                file.write(f"{os.getpid()} {open('/proc/self/oom_score_adj').read()}")
            if open("/proc/self/comm").read() == "lastcall-image\\n":
                ODD

sys.meta_path.insert(0, Noted())
"""


def note_imports(directory: Path, odd: str = "pass") -> dict[str, str]:
    """Return the environment that has each process note that it imports livekit-agents."""
    (directory / "sitecustomize.py").write_text(IMPORTS.replace("ODD", odd))
    return {**ON, "PYTHONPATH": str(directory), "IMPORTS": str(directory / "imports")}


def importers(directory: Path) -> list[int]:
    return list(orders(directory))


def orders(directory: Path) -> dict[int, int]:
    """Return by pid the oom_score_adj that each process had when it imported."""
    lines = (directory / "imports").read_text().splitlines()
    return {int(pid): int(value) for pid, value in map(str.split, lines)}


def images(r: Run) -> list[psutil.Process]:
    return [p for p in psutil.Process(r.pid).children() if name_of(p) == IMAGE.decode()]


def channels(pid: int) -> set[str]:
    """Return the pipes and sockets that a process has open."""
    found = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")}
    return {each for each in found if each.startswith(("pipe:", "socket:"))}


def mark(process: psutil.Process) -> str:
    return process.environ()[variables.MARK]


async def test_workers_of_one_image(run: StartRun, tmp_path: Path) -> None:
    """One import serves two workers, whose processes are as those of workers that import by themselves.

    A worker, and then the image, are killed, and the image is stopped: no other worker and no job is
    concerned, and each slot has one worker again.
    """
    r: Run = await run("run", "--grace", "40", "-w", "2", AGENT, environment=note_imports(tmp_path))
    await r.ready(2)
    (image,) = images(r)
    assert importers(tmp_path) == [image.pid]
    assert (await status(r))["image"] == {"state": "ready", "pid": image.pid, "reason": None, "left_out": {}}
    assert oom_adjustment(image.pid) == FIRST_TO_DIE - 1
    first, second = r.workers()
    for worker in (first, second):
        assert (worker.ppid(), os.getsid(worker.pid)) == (r.pid, worker.pid)
        assert worker.name() != IMAGE.decode() and worker.cmdline()[-1] == AGENT
        assert oom_adjustment(worker.pid) == oom_adjustment(r.pid)
        tree = [worker, *worker.children(recursive=True)]
        assert FORKSERVER.decode() in {p.name() for p in worker.children()}
        assert {mark(p) for p in tree} == {mark(worker)}
        assert all(p.environ()["JOB_LOG"] == str(r.job_log) for p in tree)
    assert mark(first) != mark(second) != mark(image)
    mine = channels(first.pid)
    of_others = [second.pid, *(p.pid for p in second.children(recursive=True)), image.pid]
    assert not any(mine & channels(pid) for pid in of_others)
    jobs = [await r.dispatch(room, mode="hold") for room in ("a", "b")]
    notes = [await r.job_says(job.job_id, "started") for job in jobs]
    by_worker = {psutil.Process(psutil.Process(note["pid"]).ppid()).ppid(): note["pid"] for note in notes}

    async def replaced(worker: psutil.Process) -> psutil.Process:
        before = {p.pid for p in r.workers()}
        worker.kill()
        await r.until(lambda: len({p.pid for p in r.workers()} - before) == 1, 30)
        await r.until(lambda: len(r.livekit.available()) == 2, 30)
        (new,) = [p for p in r.workers() if p.pid not in before]
        return new

    # A worker is killed: the next one is a fork, and what belongs to the other worker lives.
    lasting = by_worker.get(second.pid)
    new = await replaced(first)
    assert importers(tmp_path) == [image.pid]
    assert lasting is None or lives(lasting)
    assert all(lives(p.pid) for p in second.children())

    # The image is killed: nobody else notices, and a worker that is needed meanwhile imports by itself.
    image.kill()
    await r.until(lambda: not lives(image.pid))
    alone = await replaced(new)
    assert orders(tmp_path)[alone.pid] == FIRST_TO_DIE - 1, "its imports take no call's memory"
    assert {oom_adjustment(p.pid) for p in (alone, *alone.children())} == {oom_adjustment(r.pid)}
    await r.until(lambda: bool(images(r)), 30)
    (image,) = images(r)
    await r.until(lambda: r.log("image ready")[-1]["pid"] == image.pid, 30)

    # The image hangs: it is killed, and the worker starts without it.
    image.suspend()
    later = await replaced(alone)
    assert later.pid in importers(tmp_path)
    assert "silent" in r.log("image is killed")[-1]["reason"]
    assert len(r.workers()) == 2
    assert lasting is None or lives(lasting)

    r.kill_all()
    # There is no drain where the jobs were those of the worker that was killed.
    await r.until(lambda: r.log("stop fencing"))
    r.let_go()
    assert await r.exit() == 0
    await r.nothing_left()


async def test_worker_that_is_killed_beside_one_that_starts(run: StartRun) -> None:
    """The sweep of a killed worker touches neither a process of another slot nor a fork that is to be one.

    The image is killed as the stop begins: no other is made, and the call goes on to its end.
    """
    r: Run = await run("run", "--grace", "120", "-w", "2", AGENT, environment=ON)
    await r.ready(2)
    job = await r.dispatch(mode="hold")
    note = await r.job_says(job.job_id, "started")
    holder = psutil.Process(psutil.Process(note["pid"]).ppid()).ppid()
    (killed,) = [worker for worker in r.workers() if worker.pid != holder]
    lasting = psutil.Process(holder).children(recursive=True)
    asked = asyncio.create_task(verb(r, "scale", "3"))
    killed.kill()
    await asked
    await r.ready(3)
    assert lives(note["pid"]) and all(lives(process.pid) for process in lasting)
    assert not r.log("slot quarantined") and len(r.log("slot failed")) == 1
    # The supervisor learns in one moment of the stop, and of the end of its image.
    (image,) = images(r)
    os.kill(r.pid, signal.SIGSTOP)
    image.kill()
    r.kill_all()
    os.kill(r.pid, signal.SIGCONT)
    await r.until(lambda: r.log("stop draining"))
    r.let_go()
    assert await r.exit() == 0
    assert len(r.log("image starts")) == 1
    await r.clean(job)


@pytest.mark.core
async def test_reload_and_stop(run: StartRun, tmp_path: Path) -> None:
    """A reload makes another image. The old one ends after it, or the new one if the reload has failed.

    A stop that reaches every process, as soon as the new worker works, ends all of them.
    """
    agent = tmp_path / "agent.py"
    agent.write_text(Path(AGENT).read_text())
    r: Run = await run("run", "--grace", "40", str(agent), environment=ON)
    await r.ready()
    (old,) = images(r)
    agent.write_text("import nothing_of_that_name")
    await verb(r, "reload")
    await r.until(lambda: r.log("reload failed"), 40)
    await r.until(lambda: images(r) == [old])
    assert len(r.livekit.available()) == 1
    agent.write_text(Path(AGENT).read_text())
    job = await r.dispatch(mode="hold")
    await r.job_says(job.job_id, "started")
    await verb(r, "reload")
    await r.until(lambda: r.log("reload done"), 40)
    await r.until(lambda: not lives(old.pid))
    (new,) = images(r)
    assert new != old
    r.kill_all()
    await r.until(lambda: not lives(new.pid))
    r.let_go()
    assert await r.exit() == 0
    await r.clean(job)


async def test_stop_while_the_image_is_made(run: StartRun, tmp_path: Path) -> None:
    """The stop waits for no image; and a hold-up of the image ends with a supervisor that is killed.

    The first image is killed, and the worker starts without one while the next is made.
    """
    hangs = note_imports(tmp_path, odd="time.sleep(600)")
    r: Run = await run("run", "--grace", "40", AGENT, environment=hangs)
    await r.until((tmp_path / "imports").exists, 20)
    (image,) = images(r)
    image.kill()
    await r.ready()
    await r.until(lambda: len(r.log("image starts")) > 1, 30)
    r.kill_all()
    assert await r.exit(15) == 0
    await r.nothing_left()
    (tmp_path / "imports").unlink()
    killed: Run = await run("run", "--grace", "40", AGENT, environment=hangs)
    await killed.until((tmp_path / "imports").exists, 20)
    (image,) = images(killed)
    image.suspend()
    killed.kill(signal.SIGKILL)
    await killed.until(lambda: not lives(image.pid))


async def test_image_that_could_not_be_forked(run: StartRun, tmp_path: Path) -> None:
    """Where an import has left a thread, workers are started as without an image, and the log says why."""
    odd = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
    r: Run = await run("run", "--grace", "40", AGENT, environment=note_imports(tmp_path, odd))
    await r.ready()
    (said,) = r.log("workers start without an image")
    assert said["reason"] == "an import has started a thread"
    assert (await status(r))["image"] == {
        "state": "off",
        "pid": None,
        "reason": said["reason"],
        "left_out": {},
    }
    (worker,) = r.workers()
    assert importers(tmp_path)[1:] == [worker.pid]
    assert not images(r)
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


@pytest.mark.core
async def test_plugins_with_native_code(run: StartRun) -> None:
    """The image has the plugin of OpenAI, and onnxruntime. A job uses both, and the plugin of Silero.

    onnxruntime is left out where its telemetry is on, because of an open file.
    """
    r: Run = await run("run", "--grace", "40", LISTENS, environment={**ON, "ORT_DISABLE_TELEMETRY": "1"})
    await r.ready()
    image = (await status(r))["image"]
    assert image["state"] == "ready"
    assert image["left_out"] == {"livekit.plugins.silero": "it has an exit handler"}
    job = await r.dispatch()
    note = await r.job_says(job.job_id, "ended")
    assert "onnxruntime" in Path(f"/proc/{image['pid']}/maps").read_text()
    assert note["silence"] and note["model"]
    r.kill()
    assert await r.exit() == 0
    await r.clean(job)


async def test_image_that_fails_in_each_phase(run: StartRun, tmp_path: Path) -> None:
    """An image that is stopped, or killed, takes no start, no reload and no stop along.

    The image is stopped and continued while the supervisor starts and while a reload makes the next one,
    which is killed then. The old one is stopped in the reload, and the last one in the stop.
    """
    held = tmp_path / "held"
    held.touch()
    odd = f"while os.path.exists({str(held)!r}): time.sleep(0.05)"
    r: Run = await run("run", "--grace", "120", AGENT, environment=note_imports(tmp_path, odd))
    await r.until((tmp_path / "imports").exists, 30)
    (first,) = images(r)
    assert (await status(r))["image"]["state"] == "making"
    first.suspend()
    first.resume()
    held.unlink()
    await r.ready()
    assert importers(tmp_path) == [first.pid]
    job = await r.dispatch(mode="hold")
    await r.job_says(job.job_id, "started")

    held.touch()
    await verb(r, "reload")
    await r.until(lambda: len(importers(tmp_path)) == 2, 30)
    (second,) = [image for image in images(r) if image.pid == importers(tmp_path)[1]]
    first.suspend()
    second.suspend()
    second.resume()
    second.kill()
    await r.until(lambda: r.log("reload done"), 60)
    assert importers(tmp_path)[2] == max(r.workers(), key=lambda p: p.create_time()).pid
    await r.until(lambda: not lives(first.pid))
    held.unlink()
    await r.until(lambda: len(r.log("image ready")) == 2, 60)

    (third,) = images(r)
    assert (await status(r))["image"] == {"state": "ready", "pid": third.pid, "reason": None, "left_out": {}}
    third.suspend()
    r.kill_all()
    await r.until(lambda: not lives(third.pid))
    r.let_go()
    assert await r.exit() == 0
    await r.clean(job)


async def test_program_that_starts_while_its_image_is_made() -> None:
    """The time in which a reload's worker has to register begins once it has been started."""
    generation, _ = generation_in(SlotState.STOPPED)
    shared = generation.shared
    shared.config = Config(start=Start(timeout=0.05))

    class Launching:
        is_opaque, image, starts_within = False, None, 60.0

        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        async def start(self, *_: object, **more: object) -> None:
            await asyncio.sleep(self.seconds)
            raise SpawnError(f"after {self.seconds} s")

    old: Any = Launching(0)
    new: Any = Launching(0.3)
    restarts = Restarts(RestartPolicy(first=100, cap=100), random.Random())
    slot = Slot(0, launcher=old, restarts=restarts, shared=shared, on_fault=lambda *_: None)
    running = asyncio.create_task(slot.run())
    await slot.changed.until(lambda: slot.last_exit)
    slot.config_error = ""
    why = await slot.replace("reload", new, cause="reload")
    ending = Ending(reason="end", deadlines=plan(now(), 1.0, Shares()))
    await slot.stop(ending)
    await running
    assert why == "after 0.3 s"


@pytest.mark.parametrize(
    ("cause", "is_final"),
    [(OSError(errno.EAGAIN, ""), False), (OSError(errno.EACCES, ""), True), (None, True)],
)
async def test_first_start_that_fails(cause: OSError | None, is_final: bool) -> None:
    """A system without room for another process is no wrong configuration: the start is tried again."""
    generation, _ = generation_in(SlotState.STOPPED)

    class Launching:
        is_opaque, image, starts_within = False, None, 0.0

        async def start(self, *_: object, **more: object) -> None:
            raise SpawnError("not now") from cause

    launcher: Any = Launching()
    restarts = Restarts(RestartPolicy(first=100, cap=100), random.Random())
    slot = Slot(0, launcher=launcher, restarts=restarts, shared=generation.shared, on_fault=lambda *_: None)
    running = asyncio.create_task(slot.run())
    await slot.changed.until(lambda: slot.last_exit)
    await slot.changed.until(lambda: slot.first_load_over)
    assert slot.config_error == ("not now" if is_final else "")
    await slot.stop(Ending(reason="end", deadlines=plan(now(), 1.0, Shares())))
    await running


# -- without livekit-agents ---------------------------------------------------------------------------------

# An image that imports nothing. Its workers write their environment.
BARE_IMAGE = """
import json, multiprocessing, os, random, sys, time
import numpy.random
from lastcall.worker.base.settings import WorkerSettings
from lastcall.worker.sdk import forkserver, image_process as image, preflight
image.IMPORTED = image.WORKER_MODULES = image.WARM_UP = ()
preflight.check = lambda: []
run_target = lambda: None
exec(sys.argv[1])
settings, imports = image.serve(WorkerSettings.take(os.environ), run_target, lambda *_: False)
dice = sys.modules.get("dice")
told = {
    "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0), "slot": settings.slot,
    "mark": os.environ["LASTCALL_MARK"], "random": [random.random(), numpy.random.random()],
    "dice": dice and [dice.UNSEEDED.random(), dice.of_default(), dice.NUMPYS.random()],
    "seeded": dice and [dice.SEEDED.random(), dice.SEEDED_NUMPYS.random()],
    "open": [int(fd) for fd in os.listdir("/proc/self/fd")],
    "modules": list(sys.modules), "key": multiprocessing.current_process().authkey.hex(),
}
if dice:
    forkserver.fork(imports)
    context = multiprocessing.get_context("forkserver")
    told["jobs"] = []
    for _ in range(2):
        reader, writer = context.Pipe(duplex=False)
        job = context.Process(target=dice.tell, args=(writer,))
        job.start()
        told["jobs"].append(reader.recv())
        job.join()
os.write(1, json.dumps(told).encode() + b"\\n")
"""
# A supervisor of images alone. `sys.argv[3]` is what it does with one.
SUPERVISOR = """
import asyncio, errno, json, os, resource, signal, sys, time
from lastcall.supervisor.processes import image as images
from lastcall.supervisor.processes.child import pipe, high
from lastcall.supervisor.processes.descendants import image_mark_of, mark_of
from lastcall.supervisor.processes.launch import Launcher, image_environment
from lastcall.supervisor.processes.reaper import Reaper
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.settings import WorkerSettings

class Log:
    lines = []
    def info(self, event, **more): self.lines.append((event, more))
    warning = error = info

async def main():
    reaper, log, known, is_stopping = Reaper(), Log(), set(), False
    reaper.start()
    image = images.Image(
        [sys.executable, "-c", sys.argv[1], sys.argv[2]],
        environment=image_environment(os.environ, "supervisor", 0), reaper=reaper,
        write_output=lambda lines: None, write_errors=lambda lines: sys.stderr.buffer.write(lines),
        known_pids=known, is_stopping=lambda: is_stopping, log=log,
    )

    async def fork(n, *, go=True, wanted=lambda: True, late=0.0, changed=None):
        ended, changed = asyncio.Event(), changed or Condition()
        out, out_write = pipe()
        null = high(os.open(os.devnull, os.O_RDONLY))
        settings = WorkerSettings(slot=n).to_json()
        given = {0: null, 1: out_write, 2: high(os.dup(2)), 3: high(os.dup(null)), 5: high(os.dup(null))}
        async with image.turn(changed=changed, is_wanted=wanted):
            forked = await image.fork(
                settings, mark_of("supervisor", n, 1), given, lambda status: ended.set(), changed=changed,
                is_wanted=wanted,
            )
        for fd in given.values():
            os.close(fd)
        told = None
        if forked is not None:
            name = open(f"/proc/{forked.child.pid}/comm").read()
            assert name == "lastcall-image\\n", "not a worker yet"
            time.sleep(late)  # the loop is held up
            forked.go() if go else forked.end()
            await asyncio.wait_for(ended.wait(), 20)
            text = os.read(out, 1 << 16)
            told = json.loads(text) if text else str(forked.child.status)
        os.close(out)
        return told

    result = {}
    exec("async def do():\\n" + sys.argv[3], {**globals(), **locals()}, scope := {})
    result["did"] = await scope["do"]()
    image.close()
    while image.pid is not None:
        await asyncio.sleep(0.01)
    result["log"] = [event for event, _ in log.lines]
    result["reasons"] = [more.get("reason") for _, more in log.lines if more.get("reason")]
    result["left"] = sorted(known)
    print(json.dumps(result))

asyncio.run(main())
"""


def do(steps: str, *, odd: str = "") -> Any:
    """Run SUPERVISOR; return what it tells."""
    body = "".join(f"    {line}\n" for line in steps.strip().splitlines())
    found = subprocess.run(
        [sys.executable, "-c", SUPERVISOR, BARE_IMAGE, odd, body],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["left"] == []
    return told


def test_what_a_fork_is() -> None:
    """No fork shares its session, mark, settings or secrets; what it was given is all that it has open."""
    told = do("return [os.getpid(), image.pid, await fork(7), image.pid, await fork(8)]")
    pid, none, first, image, second = told["did"]
    assert none is None
    for number, worker in ((7, first), (8, second)):
        assert worker["parent"] == pid and worker["session"] == worker["pid"] != image
        assert (worker["slot"], worker["mark"]) == (number, f"supervisor:{number:03d}:{1:09d}")
        assert set(worker["open"]) == {0, 1, 2, 3, 5} | {4}, "4 is the directory that lists them"
    assert not set(first["random"]) & set(second["random"])
    assert first["key"] != second["key"]


def test_many_forks() -> None:
    """Nothing grows in the image, and no zombie is left, however many workers it forks."""
    steps = """
def held():
    fds = len(os.listdir(f"/proc/{image.pid}/fd"))
    here = len(os.listdir("/proc/self/fd"))
    memory = [int(l.split()[1]) for l in open(f"/proc/{image.pid}/status") if l.startswith("VmRSS")]
    children = open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()
    return [fds, here, children, memory[0]]
for n in range(10):
    await fork(n)
before = held()
for n in range(100):
    await fork(n)
return [before, held()]
"""
    before, after = do(steps)["did"]
    assert before[:3] == after[:3]
    assert after[3] - before[3] < 256, "kilobytes"


def test_fork_that_gets_no_go() -> None:
    """A worker that was forked and is given up ends by itself, and the next one is another."""
    told = do("return [await fork(1, go=False), (await fork(2))['slot']]")
    assert told["did"] == ["killed by SIGKILL", 2]


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ("fork = image._fork; image._fork = lambda *_: time.sleep(60)", "silent for 1 s"),
        ("image._fork = lambda *_: os._exit(3)", None),
        ("image.rewrite_variable = lambda *_: os.stat('/nothing')", "no fork: [Errno 2]"),
        ("image._fork = lambda channel, _: channel.send(b'x')", "says nonsense"),
    ],
)
def test_image_that_fails(odd: str, said: str | None) -> None:
    """A request that fails is answered with no worker, and an image that can't answer is made again."""
    told = do("return [await fork(1), await fork(2)]", odd=odd)
    assert told["did"] == [None, None]
    assert said is None or any(said in reason for reason in told["reasons"]), told


def test_image_that_wakes() -> None:
    """An image that was stopped is killed after a second; the request that it wakes with gets no worker."""
    steps = """
await fork(1)
old = image.pid
os.kill(old, signal.SIGSTOP)
late = await fork(2)
while image.pid in (None, old) or not image.is_ready:
    await asyncio.sleep(0.01)
return [late, (await fork(3))["slot"]]
"""
    told = do(steps)
    assert told["did"] == [None, 3]
    assert told["log"].count("image ready") == 2


def test_no_image_in_a_stop() -> None:
    """A worker that is not wanted any more does not wait until the image has been made."""
    steps = """
wanted = [True]
waits = asyncio.create_task(fork(1, wanted=lambda: wanted[0]))
await asyncio.sleep(0)
wanted[0] = False
for changed in image._waiters:
    changed.notify()
return await waits
"""
    told = do(steps, odd="time.sleep(60)")
    assert told["did"] is None
    assert told["log"] == ["image starts"]


def test_imports_that_fail(tmp_path: Path) -> None:
    """An image that its imports end is made again after a pause; the log has the last lines."""
    steps = """
first = [await fork(1), await fork(2), image.state]
while not image.is_ready:
    await asyncio.sleep(0.01)
return [*first, (await fork(3))["slot"]]
"""
    flag = tmp_path / "failed"
    odd = f"""
if not os.path.exists({str(flag)!r}):
    open({str(flag)!r}, "w")
    sys.exit("no such thing")
"""
    told = do(steps, odd=odd)
    assert told["did"] == [None, None, "failed", 3]
    assert told["log"] == ["image starts", "image has ended", "image starts", "image ready"]
    assert "exit code 1: no such thing" in told["reasons"][0]


def test_image_that_cannot_be_killed() -> None:
    """The wait for the first image has an end, also where SIGKILL has no effect. There is no second image."""
    steps = """
images.MADE_WITHIN = 0.5
sent, images.Child.send = images.Child.send, lambda *_: None
at = time.monotonic()
got = [await fork(1), await fork(2), image.state, time.monotonic() - at < 30]
images.Child.send = sent
return got
"""
    told = do(steps, odd="time.sleep(60)")
    assert told["did"] == [None, None, "failed", True]
    assert told["log"] == ["image starts", "image is killed"]


def test_system_without_pidfds() -> None:
    """There is no image where its workers could not be watched; that is said once."""
    steps = """
def refuse(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
os.pidfd_open = refuse
return [await fork(1), await fork(2), image.state, image.reason]
"""
    told = do(steps)
    assert told["did"][:3] == [None, None, "off"]
    assert "pidfd_open: Function not implemented" in told["did"][3]
    assert told["log"] == ["workers start without an image"]


def test_reason_that_comes_with_the_end() -> None:
    """An image that says why it is unfit, and ends at once, is not made again."""
    steps = """
asked = asyncio.create_task(fork(1))
while image.pid is None:
    await asyncio.sleep(0)
time.sleep(1.5)
return [await asked, image.state, image.reason]
"""
    told = do(steps, odd="image._import = lambda: image.Imports(why='unfit')")
    assert told["did"] == [None, "off", "unfit"]
    assert told["log"] == ["image starts", "workers start without an image"]


def test_supervisor_that_is_late() -> None:
    """A worker waits for a supervisor that is held up; no start counts as failed for that."""
    assert do("return (await fork(1, late=2.0))['slot']")["did"] == 1


def test_waiters_with_one_condition() -> None:
    """A worker that is not wanted any more does not take the wake-up of another of its slot along."""
    steps = """
wanted, changed = [True], Condition()
first = asyncio.create_task(fork(1, wanted=lambda: wanted[0], changed=changed))
second = asyncio.create_task(fork(2, changed=changed))
await asyncio.sleep(0)
wanted[0] = False
changed.notify()
return [await first, (await asyncio.wait_for(second, 20))["slot"]]
"""
    assert do(steps)["did"] == [None, 2]


def test_generators_of_random_numbers(tmp_path: Path) -> None:
    """A generator that nobody has seeded differs in each worker and job, wherever it is kept.

    A seeded one does not.
    """
    (tmp_path / "dice.py").write_text(
        """
import random, numpy.random
UNSEEDED, SEEDED = random.Random(), random.Random(7)
NUMPYS, SEEDED_NUMPYS = numpy.random.default_rng(), numpy.random.default_rng(7)
def of_default(kept=random.Random()):
    return kept.random()
def tell(writer):
    writer.send([UNSEEDED.random(), of_default(), NUMPYS.random(), numpy.random.random()])
"""
    )
    odd = f"sys.path.insert(0, {str(tmp_path)!r}); image.IMPORTED = ('dice',)"
    first, second = do("return [await fork(1), await fork(2)]", odd=odd)["did"]
    assert first["seeded"] and first["seeded"] == second["seeded"]
    jobs = [number for told in (first, second) for job in told["jobs"] for number in job]
    assert len({*first["dice"], *second["dice"], *jobs}) == 6 + len(jobs)


# A launcher of workers that end at once. `limit` leaves so many descriptors, above those for children.
LAUNCHER = """
from lastcall.supervisor.errors import SpawnError
from lastcall.supervisor.processes import launch
launch.worker_command = lambda *_: ["true"]
launcher = Launcher(
    target="agent.py", arguments=(), command=(), supervisor_id="supervisor", environment=dict(os.environ),
    settings=WorkerSettings(), reaper=reaper, prefixes=False, lifeline=None, write_output=lambda _: None,
    write_errors=lambda _: None, image=image,
)
async def start(n, **more):
    ended, changed = asyncio.Event(), Condition()
    try:
        launched = await launcher.start(
            n, 1, lambda status: ended.set(), changed=changed, is_wanted=lambda: True, **more
        )
    except SpawnError as error:
        return str(error)
    await asyncio.wait_for(ended.wait(), 20)
    launched.control.close()
    launched.close()
    return "started"
def limit(spare):
    taken = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken + 1, 65) + spare, hard))
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
def opened():
    return sorted(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0] for fd in os.listdir("/proc/self/fd")
                  if os.path.exists(f"/proc/self/fd/{fd}"))
"""


@pytest.mark.parametrize(
    ("kills", "of", "then"),
    [
        (0, "image", ["started", "started", "started"]),
        (1, "image", ["no memory", "started", "no memory"]),
        (0, "scout", ["started", "started", "started"]),
        (1, "scout", ["no memory", "started", "started"]),
    ],
)
def test_image_that_is_killed_for_memory(kills: int, of: str, then: list[str]) -> None:
    """A worker that is to start beside calls needs as much as its image or its scout, and is not started.

    Once another worker has imported the target without harm, the scout's end says nothing any more.
    """
    steps = f"""
images.cgroup.oom_kills_since = lambda _: {kills}
images.AGAIN_AFTER = 600.0
{LAUNCHER}
return [await start(1, is_candidate=True), await start(2), await start(3, is_candidate=True)]
"""
    kill = "os.kill(os.getpid(), 9)"
    did = do(steps, odd=kill if of == "image" else f"run_target = lambda: {kill}")["did"]
    assert [each.partition(" for another")[0] for each in did] == then


def test_many_starts_with_few_descriptors() -> None:
    """Starts at the same time, by fork, need no more descriptors than one start and what workers keep."""
    steps = """
await start(0)
limit(16 + 4 * 20)
return await asyncio.gather(*(start(n) for n in range(20)))
"""
    told = do(LAUNCHER + steps)
    assert told["did"] == ["started"] * 20
    assert told["log"] == ["image starts", "image ready"]


@pytest.mark.parametrize("forks", [True, False])
def test_start_without_descriptors(*, forks: bool) -> None:
    """A start that finds no descriptor left fails with one line, and leaves none open."""
    steps = f"""
await start(0)
if not {forks}:
    image.close()
    while image.pid is not None:
        await asyncio.sleep(0.01)
before, told = opened(), set()
for spare in range(14):
    limit(spare)
    told.add(await start(spare))
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert opened() == before, [spare, before, opened()]
return sorted(told)
"""
    told = do(LAUNCHER + steps)
    assert told["did"] == ["no room for another worker: Too many open files", "started"]


# -- the packages of a target -------------------------------------------------------------------------------

# A target of packages that do what a package may do at its import, and the image's view of them.
PACKAGES = {
    "plain": "import numbers_; VALUE = 1",
    "numbers_": "import numpy",
    "thread": "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "sock": "import socket; KEPT = socket.socket()",
    "loop": "import asyncio; LOOP = asyncio.new_event_loop()",
    "program": "import subprocess; KEPT = subprocess.Popen(['sleep', '600'])",
    "leads": "import sock2",
    "sock2": "import os; KEPT = os.pipe()",
    "reads": "import os; MODE = os.environ.get('MODE')",
    "moves": "import os; os.chdir('/')",
    "keeps": "KEPT = open(__file__)",
    "shares": "import mmap; KEPT = mmap.mmap(-1, 10)",
    "ignores": "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "exits": "import tempfile; KEPT = tempfile.TemporaryDirectory()",
    "forks": "import os; os.fork()",
    "orphan": "import subprocess; subprocess.run('sleep 600 &', shell=True)",
    "native": "import numpy.fft",
    "named": "from spaces.inner import VALUE",
    "logs": "import logging; logging.getLogger(__name__)",
    "hidden": "",
    "misled": "import hidden",
    "last": "VALUE = 2",
}
OWN = """
import logging.config, multiprocessing, os, pathlib, sys, tempfile
sys.path.append(str(pathlib.Path(__file__).with_name("site-packages")))
import carried
pathlib.Path(os.environ["RAN_IN"]).open("a").write(f"{os.getpid()}\\n")
os.environ["MODE"] = os.environ["OMP_NUM_THREADS"] = "1"
import plain, thread, sock, loop, program, leads, reads, moves, named, own, subprocess
import keeps, shares, ignores, exits, orphan, native, hidden, misled
logging.config.dictConfig({"version": 1})
import logs, last
tempfile.tempdir = os.path.dirname(os.environ["RAN_IN"])
# A process of another context would make a directory of its own, and be killed with it.
manager = multiprocessing.get_context("fork").Manager()
pathlib.Path(os.environ["RAN_IN"] + ".program").write_text(
    str(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
)
import forks  # last, because both processes go on behind it
1 / 0
"""


def test_packages_of_a_target(tmp_path: Path) -> None:
    """The image imports the packages of a target that a fork may bring along, and none of its files.

    A package in a folder that the target puts on the path is the target's. That the working directory is gone
    changes nothing. Where the target has a file with the name of a package, no import gets that package.
    """
    installed = tmp_path / "site-packages"
    for name, text in PACKAGES.items():
        (installed / name).mkdir(parents=True)
        (installed / name / "__init__.py").write_text(text)
    (installed / "spaces" / "inner").mkdir(parents=True)
    (installed / "spaces" / "inner" / "__init__.py").write_text("VALUE = 3")
    vendored = tmp_path / "agent" / "site-packages"
    vendored.mkdir(parents=True)
    (vendored / "carried.py").write_text("")
    (tmp_path / "agent" / "own.py").write_text("")
    (tmp_path / "agent" / "hidden.py").write_text("")
    (tmp_path / "agent" / "agent.py").write_text(OWN)
    odd = f"""
import runpy
from lastcall.worker.sdk import scout
scout.MAX_REFUSED = len({list(PACKAGES)!r})
sys.path += [{str(installed)!r}, {str(tmp_path)!r}]
os.environ["RAN_IN"] = {str(tmp_path / "ran")!r}
os.mkdir({str(tmp_path / "gone")!r})
os.chdir({str(tmp_path / "gone")!r})
os.rmdir({str(tmp_path / "gone")!r})
def run_target():
    sys.path.insert(0, {str(tmp_path / "agent")!r})
    runpy.run_path({str(tmp_path / "agent" / "agent.py")!r})
"""
    steps = """
first = await fork(1)
return [first["modules"], image.left_out, image.pid, len(os.listdir(f"/proc/{image.pid}/task"))]
"""
    modules, left_out, image, threads = do(steps, odd=odd)["did"]
    kept = {"plain", "numbers_", "named", "spaces", "spaces.inner", "last"}
    assert kept <= set(modules) and not {"own", "agent", "carried", *PACKAGES} - kept & set(modules)
    assert {name: why.split(":")[0] for name, why in left_out.items()} == {
        "thread": "an import has started a thread",
        "sock": "an import has opened socket",
        "loop": "an import has opened anon_inode",
        "program": "it has started a process",
        "leads": "an import has opened pipe",
        "sock2": "an import has opened pipe",
        "reads": "it reads MODE, and the target changes that before",
        "moves": "it changes the working directory",
        "keeps": f"it keeps {installed / 'keeps' / '__init__.py'} open",
        "shares": "it shares memory",
        "ignores": "it handles a signal",
        "exits": "it has an exit handler",
        "misled": "hidden is another file here than in the target",
        "orphan": "it has started a process",
        "logs": "the target disables all loggers before, and would disable those of the package too",
        "forks": "it has started a process",
    } | dict.fromkeys(
        ("native", "numpy"),
        "it has native code, which may read OMP_NUM_THREADS, and the target changes that before",
    )
    assert not lives(int((tmp_path / "ran.program").read_text()))
    assert not list(tmp_path.glob("pymp-*"))
    (ran_in,) = (tmp_path / "ran").read_text().split()
    assert int(ran_in) != image and not lives(int(ran_in))
    assert threads == 1


@pytest.mark.parametrize(
    "target",
    [
        "while True: pass",
        "import os; os._exit(3)",
        "import os; os.kill(os.getpid(), 9)",
        "import sys; sys.exit()",
    ],
)
def test_target_that_does_not_tell(target: str) -> None:
    """A target that hangs, or ends its process, takes its packages from the image and nothing else."""
    odd = f"""
from lastcall.worker.sdk import scout
scout.SCOUT_WITHIN = 1.0
def run_target():
    exec({target!r})
"""
    assert do("return (await fork(1))['slot']", odd=odd)["did"] == 1


def test_untried_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no image with a newer livekit-agents than was tried: its imports may leave anything."""
    assert preflight.untried() == ""
    monkeypatch.setattr(preflight, "version_of", {"Python": "3.11.7", "livekit-agents": "1.9.0"}.get)
    assert preflight.untried().startswith("livekit-agents 1.9.0 is newer than 1.8")
    monkeypatch.setattr(preflight, "version_of", {"Python": "3.15.0", "livekit-agents": "1.8.9"}.get)
    assert preflight.untried().startswith("Python 3.15.0 is newer than 3.14")


@pytest.mark.parametrize(
    ("name", "file", "package"),
    [
        ("six", "/x/site-packages/six.py", "six"),
        ("p", "p/__init__.py", "p"),
        ("p.q.r", "p/q/r.py", "p"),
        ("n.p", "n/p/__init__.py", "n.p"),
        ("n.p.q", "n/p/q.py", "n.p"),
        ("n.m", "n/m.py", "n.m"),
    ],
)
def test_names_of_packages(tmp_path: Path, name: str, file: str, package: str) -> None:
    """A namespace is no package: each package in it is left out by itself."""
    for folder in ("p", "p/q", "n/p"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "__init__.py").touch()
    assert package_of(name, str(tmp_path / file)) == package
