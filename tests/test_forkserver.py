"""The forkserver that is forked from its worker: one import for both, and otherwise as a new interpreter."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from lastcall.worker.base.process import FORKSERVER, IMAGE, TRACKER
from tests.support.harness import AGENT, Run, StartRun, lives

# Notes each process that imports livekit-agents.
IMPORTS = """
import os, sys

class Noted:
    def find_spec(self, name, path=None, target=None):
        if name == "livekit.agents":
            with open(os.environ["IMPORTS"], "a") as file:
                file.write(f"{os.getpid()}\\n")

sys.meta_path.insert(0, Noted())
"""
# An agent whose module does what a module should not, and whose jobs tell how they find the process.
ODD_AGENT = """
import gc, logging, multiprocessing, os, random, signal, sys, threading
from livekit.agents import WorkerOptions, cli
import calls

loads = globals().get("loads", 0) + 1
os.environ["FROM_TARGET"] = str(os.getpid())
os.makedirs("elsewhere", exist_ok=True)
os.chdir("elsewhere")
logging.getLogger("lastcall.worker").disabled = True  # as logging.config does
signal.signal(signal.SIGUSR1, lambda *_: None)
threading.Thread(target=threading.Event().wait, daemon=True).start()

async def entrypoint(ctx):
    calls.note(
        ctx, "state", worker=os.environ["FROM_TARGET"], cwd=os.getcwd(), loads=loads, random=random.random(),
        parent=os.getppid(), main=sys.modules["__main__"].__file__, argv=sys.argv,
        name=multiprocessing.current_process().name, collects=gc.get_threshold(),
        is_silent=logging.getLogger("lastcall.worker").disabled,
    )
    await calls.entrypoint(ctx)

if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint, load_fnc=lambda: 0.1, num_idle_processes=1))
"""
# An agent that leaves shared memory, and runs its jobs in threads.
SHARING_AGENT = """
import os
from multiprocessing.shared_memory import SharedMemory
from livekit.agents import JobExecutorType, WorkerOptions, cli
import calls

if __name__ == "__main__":
    shared = SharedMemory(create=True, size=1)
    with open(os.environ["SHARED"], "w") as file:
        file.write(shared.name)
    cli.run_app(
        WorkerOptions(
            entrypoint_fnc=calls.entrypoint, load_fnc=lambda: 0.1, job_executor_type=JobExecutorType.THREAD
        )
    )
"""


def descriptors(pid: int, numbers: set[int] | None = None) -> set[tuple[str, str]]:
    """Return what descriptors of a process stand for, with the access: ends of a pipe differ by it."""
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        # The process may close any of them meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if numbers is None or int(entry.name) in numbers:
                flags = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().split("flags:")[1].split()[0]
                found.add((os.readlink(entry.path), flags[-1]))
    return found


def signals(pid: int, field: str) -> set[signal.Signals]:
    (line,) = [
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field)
    ]
    mask = int(line.split()[1], 16)
    return {number for number in signal.valid_signals() if mask >> (number - 1) & 1}


@pytest.mark.core
async def test_one_import_of_livekit(run: StartRun, tmp_path: Path) -> None:
    """The worker imports livekit-agents, and its forkserver and job processes find it there.

    They are otherwise as multiprocessing's: the agent's environment and directory, modules that are loaded in
    each process anew, no descriptor of the worker, and a new forkserver after the end of the first.
    """
    imports = tmp_path / "imports"
    (tmp_path / "sitecustomize.py").write_text(IMPORTS)
    agent = tmp_path / "odd.py"
    agent.write_text(ODD_AGENT)
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(AGENT).parent}", "IMPORTS": str(imports)}
    r: Run = await run("run", "--grace", "40", str(agent), environment=environment, cwd=tmp_path)
    await r.ready()
    (worker,) = r.workers()
    (server,) = [p for p in worker.children() if p.name() == FORKSERVER.decode()]
    states = []
    for room in ("one", "two"):
        await r.until(lambda: bool(r.livekit.available()), 30)
        job = await r.dispatch(room, mode="hold")
        states.append(await r.job_says(job.job_id, "state"))
    # The image from which the worker was forked, if there is one.
    images = [p.pid for p in psutil.Process(r.pid).children() if p.name() == IMAGE.decode()]
    assert imports.read_text().split() == [str(pid) for pid in images or [worker.pid]]
    for state in states:
        assert (state["worker"], state["parent"]) == (str(state["pid"]), server.pid)
        assert (state["cwd"], state["loads"]) == (str(tmp_path / "elsewhere" / "elsewhere"), 1)
        assert (state["main"], state["argv"], state["name"]) == (
            str(agent),
            [str(agent), "start"],
            "job_proc",
        )
        assert state["collects"] == list(gc.get_threshold())
        assert not state["is_silent"]
    assert states[0]["random"] != states[1]["random"]
    # From the supervisor the worker has the control channel, and the read ends of its output.
    given = descriptors(worker.pid, {3, 4, 5})
    assert len(given) == 3
    assert not any(given & descriptors(pid) for pid in (server.pid, states[0]["pid"], states[1]["pid"]))
    stop_signals = {signal.SIGTERM, signal.SIGINT}
    assert signals(server.pid, "SigBlk") >= stop_signals
    assert signals(server.pid, "SigIgn") == {signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ}
    assert signals(server.pid, "SigCgt") == {signal.SIGCHLD}

    # One process is warm; those after it are of the new forkserver.
    await r.until(lambda: (r.out.read_text() + r.err.read_text()).count('"process initialized"') == 3, 30)
    server.kill()
    await r.until(lambda: not lives(server.pid))
    for room in ("three", "four"):
        await r.until(lambda: bool(r.livekit.available()), 30)
        job = await r.dispatch(room, mode="hold")
        states.append(await r.job_says(job.job_id, "state", 30))
    assert states[-1]["parent"] in {p.pid for p in worker.children()} - {server.pid}
    assert "the forkserver has ended" in r.out.read_text() + r.err.read_text()
    assert all(lives(state["pid"]) for state in states)
    r.kill_all()
    await r.until(lambda: r.log("stop draining"))
    r.let_go()
    assert await r.exit() == 0
    await r.nothing_left()
    assert set(r.fates().values()) <= {"finished", "failed"}


@pytest.mark.core
async def test_worker_killed_before_its_forkserver_is_used(run: StartRun, tmp_path: Path) -> None:
    """The child that waits to be the forkserver ends with the worker: at the end of file, by itself.

    The resource tracker is a fork of the worker too. It has nothing else of the worker. The sweep lets it
    remove what the worker has left, and so does a supervisor that kills the worker.
    """
    agent = tmp_path / "shares.py"
    agent.write_text(SHARING_AGENT)
    shared = tmp_path / "shared"
    environment = {"PYTHONPATH": str(Path(AGENT).parent), "SHARED": str(shared)}
    r: Run = await run("run", "--grace", "40", str(agent), environment=environment)
    await r.ready()
    (worker,) = r.workers()
    (child,) = [p for p in worker.children() if p.name() == FORKSERVER.decode()]
    (tracker,) = [p for p in worker.children() if p.name() == TRACKER.decode()]
    assert Path("/dev/shm", shared.read_text()).exists()
    assert tracker.num_fds() == 4, "the standard streams, and the pipe that names of resources come from"
    assert signals(tracker.pid, "SigIgn") == {signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ}
    assert signals(tracker.pid, "SigCgt") == set()
    worker.kill()
    await r.until(lambda: not lives(child.pid) and not lives(tracker.pid))
    first = shared.read_text()
    assert not Path("/dev/shm", first).exists()
    await r.until(lambda: len(r.log("slot ready")) == 2, 40)
    second = shared.read_text()
    assert second != first and Path("/dev/shm", second).exists()
    r.kill(signal.SIGQUIT)
    assert await r.exit() == 75
    assert not Path("/dev/shm", second).exists()
    await r.nothing_left()


# -- where a new interpreter is started ---------------------------------------------------------------------

# Forks with a module of the test in place of livekit-agents, changes something, and starts a process.
PROGRAM = """
import gc, json, logging, multiprocessing, os, resource, signal, ssl, sys
from lastcall.worker.base import garbage
from lastcall.worker.sdk import forkserver

def threshold_of_a_fork():
    found = gc.get_threshold()
    gc.set_threshold(0)
    pid = os.fork()
    if pid == 0:
        os._exit(gc.get_threshold()[0] != 0)
    gc.set_threshold(*found)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def tell(connection):
    imported = sys.modules.get("imported")
    connection.send({
        "imported_in": getattr(imported, "pid", None),
        "variable": os.environ.get("READ_LATER"),
        "authorities": len(imported.context.get_ca_certs()) if imported else None,
        "own": len(ssl.create_default_context().get_ca_certs()),
        "collects": gc.get_threshold(),
        "shares": gc.get_freeze_count() > 0,
        "keeps": threshold_of_a_fork() == 0,
    })

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(reason)s", stream=sys.stderr)
    sys.path.insert(0, sys.argv[1])
    forkserver.IMPORTED = ("imported",)
    with garbage.no_collections():
        forkserver.fork()
    assert len(ssl.kept.get_ca_certs()) == len(ssl.create_default_context().get_ca_certs())
    os.environ["READ_LATER"] = "set"
    exec(sys.argv[2])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(json.loads(sys.argv[3]))
    near, far = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(far,))
    process.start()
    print(json.dumps({"worker": os.getpid(), **near.recv()}))
    process.join()
    raise SystemExit(process.exitcode)
"""
MODULE = """
import os, ssl
pid = os.getpid()
context = ssl.kept = ssl.create_default_context()
os.environ.get("READ_AT_IMPORT")
"""
CERTIFICATES = "import certifi; os.environ['SSL_CERT_FILE'] = certifi.where()"
# As on a network file system whose server has lost the working directory.
NO_DIRECTORY = """
import errno
def open_file(path, *arguments, real=os.open, **more):
    if path == ".":
        raise OSError(errno.ESTALE, "stale")
    return real(path, *arguments, **more)
os.open = open_file
"""
PRELOADED = ("lastcall.worker.job.preload",)


def start(
    tmp_path: Path,
    *,
    module: str = "",
    after: str = "",
    flags: tuple[str, ...] = (),
    preload: tuple[str, ...] = PRELOADED,
) -> Any:
    """Run PROGRAM; return what its process tells, and the lines that it has logged."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    (tmp_path / "imported.py").write_text(MODULE + module)
    found = subprocess.run(
        [sys.executable, *flags, str(program), str(tmp_path), after, json.dumps(preload)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={k: v for k, v in os.environ.items() if k not in ("SSL_CERT_FILE", "SSL_CERT_DIR")},
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout), found.stderr.splitlines()


def test_certificates_without_a_fork() -> None:
    """TLS contexts of the image have certificates too where multiprocessing can't be given a forkserver."""
    program = """
import multiprocessing.util, ssl
from lastcall.worker.sdk import forkserver
del multiprocessing.util.spawnv_passfds
imports = forkserver.Imports(contexts=[ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)])
(context,) = imports.contexts
forkserver.fork(imports)
assert len(context.get_ca_certs()) == len(ssl.create_default_context().get_ca_certs()) > 0
"""
    found = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(("flags", "preload"), [((), PRELOADED), (("-W", "error"), ())])
def test_fork(tmp_path: Path, flags: tuple[str, ...], preload: tuple[str, ...]) -> None:
    """The process finds what was imported before, with the environment and the certificates of now.

    A native library whose threads end in the fork does no harm: numpy brings OpenBLAS. Nor does a process
    without standard output. The process collects garbage. An agent that starts a forkserver before its server
    runs has no preload of lastcall, and finds the same. A variable that a module has only copied may change.
    """
    module = "import numpy, sys, wsgiref.handlers\nsys.stdout = None\n"
    after = f"{CERTIFICATES}; os.environ['HOME'] = '/'; sys.stdout = sys.__stdout__"
    told, logged = start(tmp_path, module=module, after=after, flags=flags, preload=preload)
    assert logged == []
    assert (told["imported_in"], told["variable"]) == (told["worker"], "set")
    assert told["authorities"] == told["own"] > 0
    assert told["collects"] == list(gc.get_threshold())
    assert told["shares"] and told["keeps"]


@pytest.mark.parametrize(
    ("module", "after", "reason"),
    [
        (
            "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
            "",
            "thread",
        ),
        ("import socket; kept = socket.socket()", "", "has opened socket:"),
        ("1 / 0", "", "an import failed: ZeroDivisionError"),
        ("", "os.environ['READ_AT_IMPORT'] = 'x'", "READ_AT_IMPORT in the environment has changed"),
        ("", "os.environ['OMP_NUM_THREADS'] = '1'", "OMP_NUM_THREADS in the environment has changed"),
        ("", "os.umask(0o27)", "Umask of the process has changed"),
        ("", "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))", "Max core file size of the process"),
        ("", "signal.signal(signal.SIGHUP, signal.SIG_IGN)", "SigIgn of the process has changed"),
        ("", "import psutil; psutil.Process().children()[0].kill()", "gone or hangs"),
        ("", NO_DIRECTORY, "the process can't be looked at: [Errno 116]"),
        ("from lastcall.worker.sdk import forkserver; forkserver.place = None", "", "take over: TypeError"),
    ],
)
def test_new_interpreter(tmp_path: Path, module: str, after: str, reason: str) -> None:
    """Where the fork would not be the same, multiprocessing starts its forkserver, and the log says why."""
    told, logged = start(tmp_path, module=module, after=after)
    assert told["variable"] == "set"
    assert told["imported_in"] is None
    assert told["collects"] == list(gc.get_threshold())
    assert told["shares"] and told["keeps"]
    assert len(logged) == 1 and reason in logged[0], logged
