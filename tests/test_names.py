"""The table of private names: it is complete, and says truly what happens without each name."""

from __future__ import annotations

import ast
import asyncio
import inspect
import multiprocessing.process
import multiprocessing.util
import os
import re
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import livekit.agents.cli
import livekit.plugins.inworld
import pytest
from livekit.agents import AgentServer
from livekit.agents.ipc import proc_pool, supervised_proc

from lastcall.worker import scratch
from lastcall.worker.base.errors import Incompatible
from lastcall.worker.inworld.plugin import private_names
from lastcall.worker.sdk import (
    agent_server,
    child_processes,
    forkserver,
    job_process,
    preflight,
    process_pool,
)
from lastcall.worker.sdk.names import INWORLD, NAMES, PrivateName
from tests.support.harness import AGENT, Run, StartRun
from tests.support.renaming import SITE, without
from tests.support.sources import nodes_of

ROOT = Path(__file__).parent.parent
FOLDERS = ("lastcall", "supervisor", "worker")
# The modules that use private names of others. In each other module no private name may stand at all.
EDGES = {
    ROOT / "worker" / "sdk" / "agent_server.py",
    ROOT / "worker" / "sdk" / "child_processes.py",
    ROOT / "worker" / "sdk" / "forkserver.py",
    ROOT / "worker" / "sdk" / "job_process.py",
    ROOT / "worker" / "sdk" / "process_pool.py",
    ROOT / "worker" / "inworld" / "plugin" / "private_names.py",
    ROOT / "worker" / "inworld" / "plugin" / "connections.py",
    ROOT / "worker" / "scratch.py",
}
TABLE = {ROOT / "worker" / "sdk" / "names.py", ROOT / "worker" / "sdk" / "preflight.py"}
# Documented in spite of the underscore.
DOCUMENTED = {"os._exit", "sys._getframe", "sample._replace"}
# The variables of the edges that hold objects of the packages, and the public names of such objects.
FOREIGN = {
    *("server", "executor", "pool", "info", "offer", "popen", "process", "connection", "context", "tts"),
    *("cli_log", "module", "supervised_proc", "http_context", "LogQueueListener", "Plugin", "plugin"),
    "proc_client",
}
PUBLIC = {"on", "load_fnc", "job", "id", "accept", "package", "done", "current_process", "__init__"}
OURS = {"call_is_over"}  # set by lastcall on an object of theirs
# Modules of the packages whose names their owner promises: those that users are told to import.
PUBLIC_MODULES = {
    "livekit.agents",
    "livekit.agents.utils",
    "livekit.protocol",
    "livekit.plugins.inworld",
    "multiprocessing",
    "multiprocessing.connection",
}


def nodes(paths: set[Path]) -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(paths):
        for node in nodes_of(path):
            yield path, node


def sources() -> set[Path]:
    return {path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and bool(re.match("_[^_]", name))


def is_inner(module: str) -> bool:
    """Tell whether a module is one of the packages', and not one that users are told to import."""
    packages = ("livekit.agents.", "livekit.plugins.", "multiprocessing.")
    return module.startswith(packages) and module not in PUBLIC_MODULES


def used() -> dict[str, set[str]]:
    """Return the private names in the source, each with the places."""
    found = defaultdict(set)
    edges = EDGES
    for path, node in nodes(sources() - TABLE):
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            root = node.value.id if isinstance(node.value, ast.Name) else ""
            is_foreign = path in edges and root in FOREIGN and node.attr not in PUBLIC | OURS
            is_own = root in ("self", "cls") or f"{root}.{node.attr}" in DOCUMENTED
            if (is_private(node.attr) and not is_own) or is_foreign:
                found[node.attr].add(place)
        elif isinstance(node, ast.Constant) and path in edges and is_private(node.value):
            found[str(node.value)].add(place)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value):
                found[str(name.value)].add(place)
        elif isinstance(node, ast.ImportFrom) and is_inner(node.module or ""):
            for alias in node.names:
                found[alias.name].add(place)
    return found


def test_every_private_name_is_listed() -> None:
    """A private name that the source uses is in the table, or it is the name of an owner there."""
    owners = {part for each in NAMES for part in re.split("[.:]", each.owner)}
    listed = {each.name for each in NAMES} | owners
    unlisted = {name: places for name, places in used().items() if name not in listed}
    assert not unlisted


def test_every_listed_name_is_used() -> None:
    """A name in the table stands somewhere in the source, as an attribute, in quotes or in an import."""
    found: set[object] = set()
    for _, node in nodes(sources() - TABLE):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant):
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom):
            found.update(alias.name for alias in node.names)
    assert [each.text for each in NAMES if each.name not in found] == []


def test_rows_of_the_table() -> None:
    """One row for each name of an owner and each span of versions; no text breaks the table of the page."""
    keys = [(each.owner, each.name, each.since) for each in NAMES]
    assert len(keys) == len(set(keys))
    for each in NAMES:
        assert not set("|\n") & set(each.needed_by + each.without + each.signature), each


# -- each name away ----------------------------------------------------------------------------------------


@pytest.mark.core
def test_each_name_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    """Without any one name the look before the start says so, or the table says what is done instead."""
    gave: dict[str, list[str]] = defaultdict(list)
    assert preflight.lacks() == []
    for name in preflight.expected(NAMES):
        with without(name):
            (lack,) = [lack for lack in preflight.lacks() if lack.name == name]
            assert not lack.is_changed
            if name.without:
                assert lack in preflight.check()
                gave[name.without].append(name.text)
            else:
                with pytest.raises(Incompatible) as refused:
                    preflight.check()
                text = str(refused.value)
                assert "\n" not in text and f"has no {name.text}, which {name.needed_by} needs" in text
                gave["exit code 78"].append(name.text)
    assert preflight.lacks() == []
    with capsys.disabled():
        versions = {each.package: preflight.version_of(each.package) for each in NAMES}
        print(f"\n{versions}: {sum(map(len, gave.values()))} names removed")
        for outcome, names in gave.items():
            print(f"  {outcome}: {len(names)} ({', '.join(names)})")


@pytest.mark.core
def test_another_signature_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that takes other arguments, or is asynchronous no more, is not the one that is needed."""

    async def more(self: Any, message: Any, priority: int) -> None:
        pass

    def no_longer(self: Any, message: Any) -> None:
        pass

    for other in (more, no_longer):
        monkeypatch.setattr(livekit.agents.AgentServer, "_queue_msg", other)
        (lack,) = preflight.lacks()
        assert lack.is_changed
        with pytest.raises(
            Incompatible, match=r"has AgentServer\._queue_msg, but not as async \(self, message\)"
        ):
            preflight.check()


# -- what is done instead ----------------------------------------------------------------------------------


class Pool:
    """A pool with no name but the public ones."""

    processes: tuple[Any, ...] = ()

    async def aclose(self) -> None:
        pass


def load(_patch: pytest.MonkeyPatch) -> None:
    assert agent_server.load_of(SimpleNamespace()) == 0.0
    assert agent_server.load_of(SimpleNamespace(_worker_load=None)) == 0.0  # what a load_fnc returned


def key(_patch: pytest.MonkeyPatch) -> None:
    """A key that can't be seen is not missed; livekit-agents looks for it at each start."""
    server = AgentServer()
    del server._api_key, server._api_secret
    assert not {"LIVEKIT_API_KEY", "LIVEKIT_API_SECRET"} & set(agent_server.missing_of(server))


def agent_name(_patch: pytest.MonkeyPatch) -> None:
    assert agent_server.agent_name(SimpleNamespace()) == ""


def given_up(_patch: pytest.MonkeyPatch) -> None:
    assert agent_server.has_given_up(SimpleNamespace()) is False


def idle_processes(_patch: pytest.MonkeyPatch) -> None:
    """No inference process is looked for, and livekit-agents closes its pool."""
    pool = Pool()
    assert agent_server.let_go_of_processes(SimpleNamespace(_proc_pool=pool)) == 0
    assert "aclose" not in vars(pool)


def run_app(patch: pytest.MonkeyPatch) -> None:
    """The function is recorded in the public place."""
    from livekit.agents.cli import cli

    patch.delattr(cli, "run_app")
    patch.setattr(livekit.agents.cli, "run_app", None)

    def record(_server: Any) -> Any:
        raise AssertionError

    agent_server.record_run_app(record)
    assert livekit.agents.cli.run_app is record


def warm(_patch: pytest.MonkeyPatch) -> None:
    assert agent_server.has_warm_process(SimpleNamespace(_proc_pool=Pool()))
    pool = SimpleNamespace(_warmed_proc_queue=asyncio.Queue())
    assert agent_server.has_warm_process(SimpleNamespace(_proc_pool=pool))


def shutdown_time(_patch: pytest.MonkeyPatch) -> None:
    """A job is asked all the same."""
    asked = []

    async def aclose() -> None:
        asked.append(1)

    for executor in (SimpleNamespace(aclose=aclose), SimpleNamespace(aclose=aclose, _opts=object())):
        asyncio.run(agent_server.ask_to_end(executor, 1.0))
    assert len(asked) == 2


def ending(_patch: pytest.MonkeyPatch) -> None:
    assert agent_server.is_ending(SimpleNamespace()) is False


def kill(patch: pytest.MonkeyPatch) -> None:
    killed = []
    patch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    agent_server.kill(SimpleNamespace(pid=1 << 22))
    assert killed == [1 << 22]


def over(_patch: pytest.MonkeyPatch) -> None:
    assert agent_server.call_is_over(SimpleNamespace()) is None
    assert agent_server.call_is_over(SimpleNamespace(_proc=SimpleNamespace())) is None


def interrupt(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(supervised_proc, "_mask_ctrl_c")
    child_processes.keep_interrupt_handler()
    assert not hasattr(supervised_proc, "_mask_ctrl_c")


def closed_child(patch: pytest.MonkeyPatch) -> None:
    for name in ("_cleanup", "_children"):
        with patch.context() as inner:
            inner.delattr(multiprocessing.process, name)
            child_processes.start_while_others_end()
            assert not hasattr(multiprocessing.process, name)


def scratch_directory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(multiprocessing.process, "current_process", SimpleNamespace)
    scratch.use("/nowhere")
    scratch.remove()


def new_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Nothing is forked."""
    patch.delattr(multiprocessing.util, "spawnv_passfds")
    patch.delattr(os, "fork")
    forkserver.fork()


def shielded_forkserver(patch: pytest.MonkeyPatch) -> None:
    from multiprocessing import forkserver as module

    patch.setattr(module, "_forkserver", object())
    assert list(agent_server.forkserver_pids()) == []
    patch.delattr(module, "_forkserver")
    assert list(agent_server.forkserver_pids()) == []


def full_by_load(_patch: pytest.MonkeyPatch) -> None:
    assert process_pool.is_full_by_load(SimpleNamespace(_proc_pool=Pool(), _worker_load=1.0)) is False
    unknown: Any = SimpleNamespace(_proc_pool=Pool(), _worker_load=None, _load_threshold=0.7)
    assert process_pool.is_full_by_load(unknown) is False
    server: Any = SimpleNamespace(_proc_pool=Pool(), _worker_load=1.0, _load_threshold=0.7)
    assert process_pool.is_full_by_load(server) is True
    without_threshold: Any = SimpleNamespace()
    agent_server.disregard_load(without_threshold)
    assert without_threshold.load_fnc() == 0.0 and not hasattr(without_threshold, "_load_threshold")


def registration(_patch: pytest.MonkeyPatch) -> None:
    async def is_ready() -> None:
        raise AssertionError

    assert process_pool.register_after(SimpleNamespace(), is_ready) is False


def proxy(_patch: pytest.MonkeyPatch) -> None:
    for server in (SimpleNamespace(), SimpleNamespace(_http_proxy="x"), SimpleNamespace(_http_session="x")):
        before = dict(vars(server))
        agent_server.connect_directly(server)
        assert vars(server) == before


def unfollowed(patch: pytest.MonkeyPatch) -> None:
    """The pool is left as it is."""
    for name in ("start", "_proc_spawn_task"):
        with patch.context() as inner:
            inner.delattr(proc_pool.ProcPool, name)
            start = getattr(proc_pool.ProcPool, "start", None)
            assert process_pool.before_first_process(lambda _: None) is False
            assert getattr(proc_pool.ProcPool, "start", None) is start


def trial(_patch: pytest.MonkeyPatch) -> None:
    """The task of a trial process runs to its end, and is owned meanwhile."""
    done = []

    async def spawn() -> None:
        done.append(len(process_pool._trials))

    async def main() -> None:
        process_pool.start_one(SimpleNamespace(_proc_spawn_task=spawn))
        await asyncio.wait(process_pool._trials)

    asyncio.run(main())
    assert done == [1] and not process_pool._trials


def reason(_patch: pytest.MonkeyPatch) -> None:
    """A process that failed is told without the reason of the process."""
    told: list[tuple[str, bool]] = []
    handlers: dict[str, Any] = {}
    pool: Any = SimpleNamespace(on=handlers.__setitem__)

    async def spawn() -> None:
        handlers["process_created"](SimpleNamespace())

    async def pause() -> None:
        pass

    def warm() -> None:
        raise AssertionError

    pool._proc_spawn_task = spawn
    process_pool.follow_processes(pool, pause=pause, warm=warm, failed=lambda *each: told.append(each))
    asyncio.run(pool._proc_spawn_task())
    assert told == [("the process could not be started", False)]


def stacks(patch: pytest.MonkeyPatch) -> None:
    """The handler that stands stays, and it does nothing."""
    from livekit.agents.ipc import proc_client

    patch.delattr(proc_client, "_dump_stack_traces")
    before = signal.getsignal(signal.SIGUSR1)
    job_process.dump_stacks_at(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is before


LESSER = {
    "_api_key": key,
    "_api_secret": key,
    "_load_threshold": full_by_load,
    "_get_effective_load": full_by_load,
    "_connection_task": registration,
    "_http_proxy": proxy,
    "_http_session": proxy,
    "start": unfollowed,
    "_proc_spawn_task": unfollowed,
    "process_created": unfollowed,
    "_spawn_tasks": trial,
    "_initialize_fut": reason,
    "_worker_load": load,
    "_agent_name": agent_name,
    "_connection_failed": given_up,
    "_inference_executor": idle_processes,
    "_closed": idle_processes,
    "run_app": run_app,
    "_warmed_proc_queue": warm,
    "_default_num_idle_processes": warm,
    "_opts": shutdown_time,
    "close_timeout": shutdown_time,
    "_shutting_down_fut": ending,
    "_kill_sent": kill,
    "_proc": over,
    "_popen": over,
    "_mask_ctrl_c": interrupt,
    "_cleanup": closed_child,
    "_children": closed_child,
    "_config": scratch_directory,
    "_forkserver": shielded_forkserver,
    "_forkserver_pid": shielded_forkserver,
    "spawnv_passfds": new_interpreter,
    "_dump_stack_traces": stacks,
}


@pytest.mark.core
def test_what_is_done_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lesser mode of livekit-agents and multiprocessing works, and none is untried."""
    lesser = {each.name for each in NAMES if each.without and each.package != INWORLD}
    assert lesser == set(LESSER)
    for way in set(LESSER.values()):
        with monkeypatch.context() as patch:
            way(patch)


INWORLD_NAMES = [each for each in NAMES if each.package == INWORLD]


@pytest.mark.core
@pytest.mark.parametrize("name", INWORLD_NAMES, ids=lambda name: f"{name.text}-{name.expected_of}")
def test_plugin_without_a_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: PrivateName
) -> None:
    """Its connections are left alone, and the use of a TTS is seen; a warning says what is missing."""
    if name not in preflight.expected(INWORLD_NAMES):
        pytest.skip("no name of this version")
    cls: Any = livekit.plugins.inworld.TTS
    for method in ("stream", "synthesize", "prewarm"):
        monkeypatch.setattr(cls, method, getattr(cls, method))
    monkeypatch.setattr(cls.stream, "is_watched", False, raising=False)
    names = ("_get_pool", "_get_connection")
    for each in names:  # whatever has watched the class in this process before
        if hasattr(cls, each):
            monkeypatch.setattr(cls, each, inspect.unwrap(getattr(cls, each)))
    used: list[Any] = []

    def never(*_: Any) -> Any:
        raise AssertionError

    with without(name):
        private_names.watch(cls, used=lambda *each: used.append(each), opened=never, is_over=never)
    assert [record.missing for record in caplog.records] == [preflight.Lack(name=name).text]  # type: ignore[attr-defined]
    assert cls.stream.is_watched
    assert not any(hasattr(getattr(cls, each, None), "__wrapped__") for each in names)


# -- with real workers -------------------------------------------------------------------------------------


async def said(r: Run) -> str:
    """Return the one line that a refused start says."""
    assert await r.exit(30) == 78
    (line,) = [line for line in r.err.read_text().splitlines() if line.startswith("lastcall: ")]
    assert "Traceback" not in r.logs()
    assert r.livekit.events == []
    await r.nothing_left()
    return line


def renaming(tmp_path: Path, name: str) -> dict[str, str]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE.replace("{name}", name))
    return {"PYTHONPATH": str(tmp_path / "site")}


@pytest.mark.core
async def test_version_without_a_needed_name(run: StartRun, tmp_path: Path) -> None:
    """The start is refused in one line, and no worker has registered."""
    r: Run = await run("run", AGENT, environment=renaming(tmp_path, "_proc_pool"))
    assert "has no AgentServer._proc_pool, which the register of jobs needs" in await said(r)


@pytest.mark.core
async def test_name_that_is_missing_once_the_server_runs(run: StartRun, tmp_path: Path) -> None:
    """The start is refused before the worker registers."""
    agent = tmp_path / "agent.py"
    agent.write_text(
        "from livekit.agents import AgentServer\n"
        "class Server(AgentServer):\n"
        "    def emit(self, event, *arguments):\n"
        "        if event == 'worker_started':\n"
        "            del self._conn_task\n"
        "        super().emit(event, *arguments)\n"
        "server = Server()\n"
        "@server.rtc_session()\n"
        "async def entrypoint(ctx):\n    pass\n"
    )
    r: Run = await run("run", f"{agent}:server")
    assert "has no AgentServer._conn_task, which the look at the connection needs" in await said(r)


@pytest.mark.core
async def test_version_without_a_name_that_can_be_missing(run: StartRun, tmp_path: Path) -> None:
    """A call is taken and drained as ever, and the log says once what is missing and what is done instead."""
    r: Run = await run("run", "--grace", "40", AGENT, environment=renaming(tmp_path, "_kill_sent"))
    await r.ready()
    job = await r.dispatch(sleep=1)
    await r.job_says(job.job_id, "started")
    r.kill()
    assert await r.exit(30) == 0
    assert r.livekit.jobs[job.job_id].status == "JS_SUCCESS"
    (line,) = [line for line in r.out.read_text().splitlines() if "a private name is missing" in line]
    assert "SupervisedProc._kill_sent" in line and "logs an error" in line
    await r.clean()
