"""A target under lastcall is the program that it is under `python agent.py start`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lastcall.supervisor.config.loading import load
from lastcall.supervisor.deploy import docker, k8s, systemd
from lastcall.supervisor.deploy.service import Service
from lastcall.supervisor.errors import ConfigError
from lastcall.supervisor.rehearsal import stage
from lastcall.worker import target as loading
from lastcall.worker.base.errors import TargetError
from lastcall.worker.base.target_form import TargetForm, parse
from tests.support.harness import LASTCALL, Run, StartRun

ROOT = Path(__file__).parent.parent
AGENT = """
from livekit.agents import JobContext, WorkerOptions, cli

async def entrypoint(ctx: JobContext):
    ctx.shutdown()

if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint, num_idle_processes=1))
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


async def job_runs(r: Run) -> None:
    """Wait for the worker, see one job to its end, and stop."""
    await r.ready()
    job = await r.dispatch()
    await r.until(lambda: r.livekit.jobs[job.job_id].status == "JS_SUCCESS", 20)
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


async def refused(r: Run, expected: str) -> None:
    """Wait for exit 78, with one line that says why."""
    assert await r.exit(30) == 78
    said = [line for line in r.err.read_text().splitlines() if line.startswith("lastcall: ")]
    assert len(said) == 1, r.logs()
    assert expected in said[0]
    assert "Traceback" not in r.logs()
    await r.nothing_left()


SETTINGS = """
import os

class Settings:
    port: int = 8000

for name, kind in Settings.__annotations__.items():
    setattr(Settings, name, kind(os.environ.get(name.upper(), getattr(Settings, name))))
if __name__ == "__main__":
    assert __spec__ is None and __loader__.get_source(__name__).startswith(chr(10) + "import os")
"""


LINKS = {"a file": "2026-01-01T10:00/agent.py", "a directory": "current:1/agent.py:server"}


@pytest.mark.parametrize("link", LINKS)
async def test_file_behind_a_link(run: StartRun, tmp_path: Path, link: str) -> None:
    """A link to the file, or to its directory: the modules beside the file itself are imported.

    Annotations hold classes: the file is not compiled with __future__ imports of lastcall. Only the last
    colon begins an attribute, and any other one belongs to the path.
    """
    named = AGENT.replace("if __name__", "server = WorkerOptions(entrypoint_fnc=entrypoint)\n\nif __name__")
    write(tmp_path / "app:0/helper.py", "N = 1\n")
    write(tmp_path / "app:0/agent.py", f"{SETTINGS}import helper\n{named}")
    (tmp_path / "2026-01-01T10:00").mkdir()
    (tmp_path / "2026-01-01T10:00/agent.py").symlink_to("../app:0/agent.py")
    (tmp_path / "current:1").symlink_to("app:0")
    await job_runs(await run("run", "--grace", "30", LINKS[link], cwd=tmp_path))


def test_parts_of_a_target() -> None:
    """A path may have colons, and an attribute follows the last one."""
    assert parse("a:b/agent.py") == TargetForm(file="a:b/agent.py")
    assert parse("a:b/agent.py:server") == TargetForm(file="a:b/agent.py", attribute="server")
    assert parse("a.b.py") == TargetForm(file="a.b.py")


def test_target_that_is_too_long(tmp_path: Path) -> None:
    """One short line, by whatever way the target comes."""
    for target in ("a" * 5000 + ".py", "é" * 60_000 + ".py", "a" * 200_000 + ":b", "-m " + "a" * 5000):
        with pytest.raises(ValueError, match="expected at most 4096") as refused:
            parse(target)
        assert len(str(refused.value)) < 200
        config = write(tmp_path / "lastcall.toml", f"target = '{target}'\n")
        with pytest.raises(ConfigError, match=r"target: got .*expected at most 4096") as told:
            load({}, {}, file=str(config))
        assert len(str(told.value)) < 500
    assert parse("app.main:server") == TargetForm(module="app.main", attribute="server")
    for wrong in (
        "",
        "app",
        "app:",
        ":x",
        "a.py:",
        "a.py:x:y",
        "a.py:b c",
        ".py",
        "a:b:c",
        "a.py\n",
        "a b:c",
    ):
        with pytest.raises(ValueError, match="expected"):
            parse(wrong)


def test_unit_of_a_path_with_a_colon() -> None:
    """The unit and its working directory have the whole path."""
    text = systemd.unit(Service(target="/srv/10:00/agent.py:server"))
    assert "run /srv/10:00/agent.py:server " in text
    assert "WorkingDirectory=/srv/10:00\n" in text


IMPORTS = {
    "from": ("from livekit.plugins import no_such", "install livekit-plugins-no-such or correct the name"),
    "beside": ("from livekit.plugins import inworld, nosuch", "install livekit-plugins-nosuch or correct"),
    "module": ("import livekit.plugins.nosuch", "install livekit-plugins-nosuch or correct"),
    "inside": (
        "from livekit.plugins.nosuch import TTS",
        "install livekit-plugins-nosuch or correct the name",
    ),
    "name": ("from livekit.agents import NoSuch", "agent.py line 1); install a version that has it"),
    "in a plugin": ("from livekit.plugins.inworld import NoSuch", "install a version that has it"),
    "relative": ("from .helper import N", "run the file as a module of its package, as in -m package.module"),
    "library": ("raise ImportError('libx.so.1: cannot open shared object file')", "libx.so.1: cannot open"),
}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test load a target: the test's process is itself again after that."""
    for name in ("path", "argv"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    for name in ("__main__", "__mp_main__"):
        monkeypatch.setitem(sys.modules, name, sys.modules["__main__"])


def refusal(target: str, **hooks: Any) -> str:
    """Return why the target is refused, in one line."""
    known: dict[str, Any] = {
        "record": lambda _: None,
        "refuse_to_run": lambda _: lambda _: None,
        "classify": lambda _: None,
    }
    with pytest.raises(TargetError) as caught:
        loading.load(loading.parse(target), **(known | hooks))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Python's own, of a relative import in a file that has no package.
@pytest.mark.filterwarnings("ignore:can't resolve package:ImportWarning")
@pytest.mark.parametrize("case", IMPORTS)
@pytest.mark.usefixtures("program")
def test_failed_import(tmp_path: Path, case: str) -> None:
    """No retry helps an import: each kind of failure is wrong configuration, with what to install."""
    text, expected = IMPORTS[case]
    assert expected in refusal(str(write(tmp_path / "agent.py", f"{text}\n")))


NAMED = "from livekit.agents import AgentServer\nserver = AgentServer()\nName = 3\n"
WRONG = {
    "no attribute": ("app.py:servr", NAMED, "did you mean 'server'?"),
    "wrong type": ("app.py:Name", NAMED, "is a int, expected"),
    "module": ("app.py", "import no_such_module_here\n", "No module named 'no_such_module_here'"),
    "form": ("app", "", "expected path.py, path.py:attr, module:attr or -m module"),
    "no agent": ("app.py", "x = 1\n", "never called cli.run_app"),
    "loop": ("loop.py", "", "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.usefixtures("program")
def test_wrong_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """One line that says what to do; tests/test_start.py has what becomes of the run."""
    target, text, expected = WRONG[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.py").symlink_to("loop.py")
    write(tmp_path / "app.py", text)
    assert expected in refusal(target)


@pytest.mark.parametrize("text", ["from livekit.plugins import (nosuch)", "import livekit.plugins.nosuch"])
def test_failed_import_without_any_plugin(tmp_path: Path, text: str) -> None:
    """The statement names the plugin where `livekit.plugins` itself is missing."""
    path = str(write(tmp_path / "agent.py", f"{text}\n"))

    def fail(*_: object) -> NoReturn:
        raise ModuleNotFoundError("No module named 'livekit.plugins'", name="livekit.plugins")

    with pytest.raises(ModuleNotFoundError) as caught:
        exec(compile(text, path, "exec"), {"__builtins__": {"__import__": fail}})
    assert loading._remedy(caught.value) == "install livekit-plugins-nosuch or correct the name"


async def test_missing_plugin(run: StartRun, tmp_path: Path) -> None:
    """Exit 78 at the first load, and one line with the package to install."""
    write(tmp_path / "agent.py", "from livekit.plugins import nosuch\n")
    r = await run("run", "agent.py", cwd=tmp_path, livekit=False)
    await refused(r, "install livekit-plugins-nosuch")


ELSEWHERE = {
    "dotenv": AGENT.replace(
        "\nfrom", "\nfrom dotenv import load_dotenv\nload_dotenv(override=True)\nfrom", 1
    ),
    "ws_url": AGENT.replace("num_idle_processes=1", "ws_url='{url}', api_key='k', api_secret='s' * 32"),
}


@pytest.mark.parametrize(("verb", "way"), [("dev", "dotenv"), ("doctor", "dotenv"), ("rehearse", "ws_url")])
async def test_another_server_in_a_local_room(run: StartRun, tmp_path: Path, verb: str, way: str) -> None:
    """An agent that sets another URL is refused in one line, and no connection to that server is opened.

    It is refused at once, and not because nobody gets ready in time.
    """
    connections = []
    server = await asyncio.start_server(lambda *_: connections.append(1), "127.0.0.1", 0)
    url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    write(tmp_path / "agent.py", ELSEWHERE[way].replace("{url}", url))
    secrets = f"LIVEKIT_API_KEY=k\nLIVEKIT_API_SECRET={'s' * 32}\n"
    write(tmp_path / ".env", f"LIVEKIT_URL={url}\n{secrets}")
    async with server:
        r = await run(verb, "agent.py", cwd=tmp_path, livekit=False)
        assert await r.exit(stage.WORKERS_READY_WITHIN / 2) == (1 if verb == "doctor" else 78)
    lines = (r.out.read_text() + r.err.read_text()).splitlines()  # `logs` has the ends only
    said = [line for line in lines if f"would connect to {url}, and only the local server" in line]
    assert said and "Traceback" not in r.logs()
    if verb != "doctor":  # which has it among what else it finds
        assert r.err.read_text().splitlines()[-1].startswith("lastcall: agent.py: its server would connect")
    assert connections == []
    await r.nothing_left()


def test_addresses_of_servers() -> None:
    """The address to which livekit-agents connects is one for all spellings, and has no credentials."""
    assert loading.address_of("http://LocalHost:7880/") == loading.address_of("ws://localhost:7880")
    assert loading.address_of("wss://user:secret@x.livekit.cloud") == "wss://x.livekit.cloud"
    assert loading.address_of("") == ""
    assert "secret" not in loading.address_of("wss://user:secret@x:port")


@pytest.mark.parametrize(
    ("url", "is_one"),
    [
        *(
            (good, True)
            for good in ("wss://x.livekit.cloud", "ws://localhost:7880/", "http://[::1]:7880", "")
        ),
        *((bad, False) for bad in ("localhost:7880", "ftp://x", "wss://", "wss://[calls", "<your url>")),
        ("wss://user:secret@x.livekit.cloud", False),
    ],
)
def test_urls_of_servers(url: str, is_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the variable or the argument, the value without credentials, and the form."""
    for name, environment in (("LIVEKIT_URL", url), ("the ws_url of its server", "wss://other")):
        monkeypatch.setenv("LIVEKIT_URL", environment)
        if is_one:
            loading.check_server_url("agent.py", url)
            continue
        with pytest.raises(TargetError) as error:
            loading.check_server_url("agent.py", url)
        said = str(error.value)
        assert said.startswith(f"agent.py: {name}: got ") and "expected wss://HOST/" in said
        assert "secret" not in said and repr(url.rpartition("@")[2])[1:-1] in said


async def test_url_that_can_be_none(run: StartRun, tmp_path: Path) -> None:
    """Exit 78 and one line at the first load, where the worker tried it for as long as it was let."""
    write(tmp_path / "env", f"LIVEKIT_URL=localhost:7880\nLIVEKIT_API_KEY=k\nLIVEKIT_API_SECRET={'s' * 32}\n")
    write(tmp_path / "agent.py", AGENT)
    write(tmp_path / "lastcall.toml", 'env_file = "env"\n')
    r = await run("run", "agent.py", cwd=tmp_path, livekit=False)
    assert await r.exit(60) == 78
    said = [line for line in r.err.read_text().splitlines() if line.startswith("lastcall: ")]
    assert said == ["lastcall: agent.py: LIVEKIT_URL: got 'localhost:7880', expected wss://HOST/"]
    await r.nothing_left()


async def test_server_of_a_file_that_the_agent_reads(run: StartRun, tmp_path: Path) -> None:
    """A URL that the agent reads from a .env file counts, and the key that is not there is missed."""
    write(tmp_path / ".env", "LIVEKIT_URL=ws://127.0.0.1:9\n")
    write(tmp_path / "agent.py", ELSEWHERE["dotenv"])
    r = await run("run", "agent.py", cwd=tmp_path, livekit=False, environment={"LIVEKIT_URL": ""})
    await refused(r, "agent.py: got no LIVEKIT_API_KEY, LIVEKIT_API_SECRET, expected")


def test_servers_that_lack_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL and a key that the agent gives to its server are not looked for in the environment."""
    from livekit.agents import AgentServer, WorkerOptions

    from lastcall.worker.sdk import agent_server

    class Late(AgentServer):  # type: ignore[misc]  # livekit-agents is not type-checked here
        async def run(self, **options: bool) -> None:
            """Find a server, and run."""

    async def entrypoint(_: object) -> None:
        """Take a call."""

    for name in ("LIVEKIT_URL", "LIVEKIT_API_KEY", "LIVEKIT_API_SECRET"):
        monkeypatch.delenv(name, raising=False)
    options = WorkerOptions(entrypoint_fnc=entrypoint, ws_url="ws://x", api_key="k", api_secret="s")
    whole, empty = agent_server.as_server(options), agent_server.as_server(AgentServer())
    assert whole is not None and empty is not None
    assert agent_server.missing_of(whole) == []
    assert agent_server.missing_of(empty) == ["LIVEKIT_URL", "LIVEKIT_API_KEY", "LIVEKIT_API_SECRET"]
    assert agent_server.missing_of(Late()) == []
    monkeypatch.setenv("LIVEKIT_URL", "ws://x")
    assert agent_server.missing_of(AgentServer()) == ["LIVEKIT_API_KEY", "LIVEKIT_API_SECRET"]


OWN_SERVER = """
import asyncio, threading
from livekit.agents import AgentServer, JobContext

class Server(AgentServer):
    async def run(self, **options):
        await super().run(**options)

server = {kind}(load_fnc=lambda: 0.1)

@server.rtc_session()
async def entrypoint(ctx: JobContext):
    await asyncio.sleep(60)

async def main():
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(server.run())
    except Exception:
        print("swallowed")

if __name__ == "__main__":
    {run}
"""
RUNS = {
    "plain": ("AgentServer", "asyncio.run(server.run())"),
    "subclass": ("Server", "asyncio.run(server.run())"),
    "task": ("AgentServer", "asyncio.run(main())"),
    "thread": ("AgentServer", "threading.Thread(target=lambda: asyncio.run(server.run())).start()"),
}


@pytest.mark.parametrize("way", [way for way in RUNS if way != "thread"])
@pytest.mark.usefixtures("program")
def test_runs_its_own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """The program is refused, in whatever way it runs the server, and the server does not run."""
    from livekit.agents import AgentServer

    from lastcall.worker.sdk import agent_server

    ran: list[object] = []

    async def run(*_: object, **_more: object) -> None:
        ran.append(1)

    monkeypatch.setattr(AgentServer, "run", run)
    kind, text = RUNS[way]
    agent = write(tmp_path / "agent.py", OWN_SERVER.replace("{kind}", kind).replace("{run}", text))
    said = refusal(str(agent), refuse_to_run=agent_server.refuse_to_run, classify=agent_server.as_server)
    assert f"agent.py runs its server itself ({agent} line " in said
    assert ran == []


async def test_runs_its_own_server_in_a_thread(run: StartRun, tmp_path: Path) -> None:
    """Exit 78 in one line, and the worker never registers."""
    kind, text = RUNS["thread"]
    agent = write(tmp_path / "agent.py", OWN_SERVER.replace("{kind}", kind).replace("{run}", text))
    r = await run("run", "agent.py", cwd=tmp_path)
    await refused(r, f"agent.py runs its server itself ({agent} line ")
    assert r.livekit.events == []


async def test_named_server_with_a_run_of_its_own(run: StartRun, tmp_path: Path) -> None:
    """The same file with the server named: its guard stays shut, and lastcall runs the server."""
    text = OWN_SERVER.replace("{kind}", "Server").replace("{run}", RUNS["plain"][1])
    write(tmp_path / "agent.py", text.replace("await asyncio.sleep(60)", "ctx.shutdown()"))
    await job_runs(await run("run", "--grace", "30", "agent.py:server", cwd=tmp_path))


async def test_module_with_arguments(run: StartRun, tmp_path: Path) -> None:
    """A package's module runs as a program, in job processes too, and finds the arguments after --args."""
    write(tmp_path / "app/__init__.py", "")
    write(tmp_path / "app/helper.py", "N = 1\n")
    asserts = "import sys\nassert sys.argv[1:] == ['start', '--room', 'x', '--'], sys.argv\n"
    write(tmp_path / "app/main.py", f"from .helper import N\n{asserts}{AGENT}")
    more = ["--args", "--room", "x", "--"]
    control = ["--http", "off", "--control", str(tmp_path / "c.sock")]
    command = [*LASTCALL, "run", "-m", "app.main", "--grace", "30", *control, *more]
    r = await run(command=command, cwd=tmp_path)
    await job_runs(r)


def test_unit_of_a_module_with_arguments() -> None:
    """Each artefact has the module and the arguments, as one word each."""
    service = Service(target="-m app.main", arguments=("--room", "a b"), directory="/srv")
    text = systemd.unit(service)
    assert "run -m app.main " in text and 'receipt.json --args --room "a b"\n' in text
    assert 'CMD ["-m", "app.main", "--args", "--room", "a b"]' in docker.dockerfile(service)
    for other in (docker.compose(service), k8s.stream(service)):
        assert '["-m", "app.main", "--args", "--room", "a b"]' in other


PROBE = """
import json, os, sys

main = sys.modules["__main__"]
seen = {
    "argv": sys.argv,
    "path": sys.path,
    "directory": os.getcwd(),
    "umask": os.umask(0o22),
    "name": __name__,
    "file": __file__,
    "spec": None if __spec__ is None else __spec__.name,
    "package": __package__,
    "loader": type(__loader__).__name__,
    "main": main.__dict__ is globals(),
    "executable": sys.executable,
    "variables": sorted(n for n in os.environ if not n.startswith(("LASTCALL_", "INWORLD_"))),
    "flags": {n: getattr(sys.flags, n) for n in ("dev_mode", "optimize", "utf8_mode", "isolated")},
}

def annotated(x: int): ...

seen["annotation"] = str(annotated.__annotations__["x"])
with open("seen.json", "w") as file:
    json.dump(seen, file)
sys.exit(0)
"""


@pytest.mark.parametrize("form", [["probe.py"], ["link/probe.py"], ["-m", "package.probe"]])
async def test_same_as_python_start(run: StartRun, tmp_path: Path, form: list[str]) -> None:
    """One probe program sees the same under `python probe.py start` as under a worker of lastcall."""
    write(tmp_path / "probe.py", PROBE)
    write(tmp_path / "package/__init__.py", "")
    write(tmp_path / "package/probe.py", PROBE)
    (tmp_path / "link").symlink_to("package")
    environment = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    seen = []
    for command in (
        [sys.executable, *form, "start", "--tenant", "a"],
        [sys.executable, "-P", "-m", "lastcall.worker", *form, "--args", "--tenant", "a"],
    ):
        r = await run(command=command, cwd=tmp_path, livekit=False, environment=environment)
        await r.exit(30)
        seen.append(json.loads((tmp_path / "seen.json").read_text()))
        (tmp_path / "seen.json").unlink()
    assert seen[0] == seen[1]
