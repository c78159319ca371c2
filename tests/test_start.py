"""Signals while things start, and everything that can be wrong with a target or a configuration."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from lastcall.supervisor.views import http
from tests.support.generations import Silent
from tests.support.harness import AGENT, START, Run, StartRun
from tests.support.program import verb


def handles_signals(pid: int) -> bool:
    """Tell whether the process has reached its first line: SIGTERM is blocked or caught."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    masks = [
        int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigBlk", "SigCgt"))
    ]
    return any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)


CORE_DELAYS = (0.0, 0.1, 0.4, 1.0, 1.6, 2.5)  # the older versions start as the newest does, and are sampled
DELAYS = sorted((*CORE_DELAYS, 0.02, 0.05, 0.2, 0.6, 0.8, 1.3, 2.0, 3.0))


@pytest.mark.parametrize(
    "delay", [pytest.param(d, marks=[pytest.mark.core] if d in CORE_DELAYS else []) for d in DELAYS]
)
async def test_sigterm_while_starting(run: StartRun, delay: float) -> None:
    """From the first line of the program on a stop is a clean stop, and quick."""
    workers = "2" if delay in CORE_DELAYS else "1"
    r: Run = await run("run", "-w", workers, "--grace", "30", AGENT)
    await r.until(lambda: handles_signals(r.pid))
    await asyncio.sleep(delay)
    r.kill_all()
    assert await r.exit(20) == 0
    receipt = r.receipt()
    assert (receipt["outcome"], receipt["reason"]) == ("clean", "SIGTERM")
    assert r.events("accepted") == []
    await r.nothing_left()


@pytest.mark.core
async def test_unreachable_livekit_server(run: StartRun) -> None:
    """The worker never registers: not ready, and a stop is clean and quick."""
    nowhere = {"LIVEKIT_URL": "ws://127.0.0.1:9", "LIVEKIT_API_KEY": "k", "LIVEKIT_API_SECRET": "s" * 32}
    r: Run = await run("run", "--grace", "30", AGENT, livekit=False, environment=nowhere)
    await r.until(lambda: "failed to connect" in r.out.read_text(), 30)
    r.kill()
    assert await r.exit(15) == 0
    assert r.receipt()["outcome"] == "clean"
    await r.nothing_left()


OWN_RUN = """
from livekit.agents import AgentServer

class Server(AgentServer):
    async def run(self, **options):
        await super().run(**options)

server = Server()

@server.rtc_session()
async def entrypoint(ctx):
    pass
"""


@pytest.mark.core
@pytest.mark.parametrize("own_run", [False, True])
async def test_no_livekit_url(run: StartRun, tmp_path: Path, *, own_run: bool) -> None:
    """No start could succeed: exit 78 at the first one, and one line with what is missing and what to do.

    A class that overrides `run` may find a server there, so that is let run first.
    """
    agent = tmp_path / "own_run.py"
    agent.write_text(OWN_RUN)
    target = f"{agent}:server" if own_run else AGENT
    empty = {"LIVEKIT_URL": "", "LIVEKIT_API_KEY": "", "LIVEKIT_API_SECRET": ""}
    r: Run = await run("run", "--grace", "30", target, livekit=False, environment=empty)
    assert await r.exit(30) == 78
    said = [line for line in r.err.read_text().splitlines() if line.startswith("lastcall: ")]
    assert len(said) == 1, r.logs()
    assert "got no LIVEKIT_URL, LIVEKIT_API_KEY, LIVEKIT_API_SECRET, expected" in said[0]
    assert len(r.log("slot starting")) == 1 and "Traceback" not in r.logs()
    await r.nothing_left()


@pytest.mark.parametrize(
    ("delay", "image"), [*((delay, False) for delay in (0.0, 0.005, 0.05, 0.3)), (0.0, True), (0.005, True)]
)
async def test_sigterm_to_the_supervisor_alone_while_a_worker_starts(
    run: StartRun, delay: float, *, image: bool
) -> None:
    """A stop before the worker can read is sent again: the worker never registers, and ends by itself.

    A worker that was forked from an image registers within a tenth of a second.
    """
    environment = {"LASTCALL_START__IMAGE": str(image).lower()}
    r: Run = await run("run", "--grace", "30", AGENT, environment=environment)
    await r.until(lambda: r.log("slot starting"), START)
    await asyncio.sleep(delay)
    r.kill()
    assert await r.exit(20) == 0
    receipt = r.receipt()
    assert (receipt["outcome"], receipt["killed"]) == ("clean", [])
    assert r.events("registered") == []
    await r.nothing_left()


@pytest.mark.core
async def test_logs_are_livekits_own_and_stacks_are_dumped(run: StartRun) -> None:
    """JSON lines with the extra fields, from the worker and from its job processes.

    SIGUSR2: each worker writes where its main thread is, and lives on. The same by a verb, for one slot; a
    slot that there is none of is refused.
    """
    r: Run = await run("run", "-w", "2", "--grace", "30", AGENT)
    await r.ready(2)
    job = await r.dispatch(sleep=0.1)
    await r.until(lambda: "job began" in r.out.read_text(), 15)
    lines = [json.loads(line) for line in r.out.read_text().splitlines() if line.startswith("{")]
    (began,) = [line for line in lines if line["message"] == "job began"]
    assert (began["name"], began["level"], began["mode"]) == ("calls", "INFO", "sleep")
    assert began["job_id"] == job.job_id
    assert any(line["message"] == "registered worker" for line in lines)
    assert "slot 1" in await verb(r, "dump", "1")
    await r.until(lambda: stacks(r) == 1)
    assert "there is no slot 9" in await verb(r, "dump", "9", code=1)
    os.kill(r.pid, signal.SIGUSR2)
    await r.until(lambda: stacks(r) == 3)
    after = await r.dispatch(sleep=0.5)
    r.kill()
    assert await r.exit() == 0
    await r.clean(job, after)


def stacks(r: Run) -> int:
    """Return how often a worker has written where its main thread is."""
    return r.err.read_text().count("most recent call first")


async def test_worker_alone(run: StartRun) -> None:
    """`python -m lastcall.worker` without a supervisor: a group SIGTERM drains, the job ends, exit 0."""
    import sys

    command = [sys.executable, "-m", "lastcall.worker", AGENT]
    r: Run = await run(command=command, environment={"LASTCALL_GRACE": "30"})
    await r.ready()
    job = await r.dispatch(sleep=2)
    await r.job_says(job.job_id, "started")
    os.killpg(r.pid, signal.SIGTERM)
    assert await r.exit() == 0
    assert r.livekit.jobs[job.job_id].status == "JS_SUCCESS"
    await r.nothing_left(5)


def write(directory: Path, name: str, text: str) -> str:
    path = directory / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    return str(path)


AGENT_TEXT = Path(AGENT).read_text()
SERVER_TEXT = """
from livekit.agents import AgentServer, JobContext
# The load is that of the machine, and the server gives nothing to a worker whose load is 1.
server = AgentServer(num_idle_processes=0, load_threshold=float("inf"), load_fnc=lambda: 0.5)

@server.rtc_session()
async def entrypoint(ctx: JobContext) -> None:
    import helper
    ctx.shutdown(reason=helper.WHY)

def factory():
    return server

if __name__ == "__main__":
    raise SystemExit("the guard should have been shut")
"""


@pytest.mark.core
@pytest.mark.parametrize("target", ["app.py:factory", "app:server", "worker.py"])
async def test_forms_of_target(run: StartRun, tmp_path: Path, target: str) -> None:
    """A job runs and ends with each form; the file may be called worker.py and have modules beside it."""
    write(tmp_path, "app.py", SERVER_TEXT)
    write(tmp_path, "helper.py", "WHY = 'helped'\n")
    text = AGENT_TEXT.replace("import asyncio\n", "import asyncio\nimport helper\n", 1)
    write(tmp_path, "worker.py", text)
    r: Run = await run("run", "--grace", "30", target, cwd=tmp_path)
    await r.ready()
    job = await r.dispatch(sleep=0.1)
    await r.until(lambda: r.livekit.jobs[job.job_id].status == "JS_SUCCESS", 15)
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


async def test_package_beside_the_target(run: StartRun, tmp_path: Path) -> None:
    """A target in one folder imports a package that stands beside it, whatever the working directory."""
    write(tmp_path, "src/calls/__init__.py", "LENGTH = 0.1\n")
    target = write(
        tmp_path,
        "src/agent.py",
        AGENT_TEXT.replace("import asyncio\n", "import asyncio\nfrom calls import LENGTH\n", 1),
    )
    r: Run = await run("run", "--grace", "30", target, cwd=Path("/"))
    await r.ready()
    job = await r.dispatch(sleep=0.1)
    await r.until(lambda: r.livekit.jobs[job.job_id].status == "JS_SUCCESS", 15)
    r.kill()
    assert await r.exit() == 0


WRONG = {
    "no_file": ("missing.py", "", "no file 'missing.py'"),
    "syntax": ("app.py", "def broken(:\n", "SyntaxError"),
    "no_session": (
        "app.py:server",
        "from livekit.agents import AgentServer\nserver = AgentServer()\n",
        "rtc_session",
    ),
}


@pytest.mark.parametrize("case", WRONG)
async def test_wrong_target(run: StartRun, tmp_path: Path, case: str) -> None:
    """Exit 78, without a second try: one line that says what to do, no traceback.

    Three workers find the same, at an import of the target and after one, and one of them is heard.
    tests/test_target.py has what else can be wrong.
    """
    target, text, expected = WRONG[case]
    if text:
        write(tmp_path, "app.py", text)
    workers = "1" if case == "no_file" else "3"
    r: Run = await run("run", "-w", workers, target, cwd=tmp_path, livekit=False)
    assert await r.exit(START) == 78
    said = [line for line in r.err.read_text().splitlines() if line.startswith("lastcall: ")]
    assert len(said) == 1, r.logs()
    assert expected in said[0]
    assert "Traceback" not in r.logs()
    await r.nothing_left()


async def test_working_directory_that_is_gone(run: StartRun, tmp_path: Path) -> None:
    """A target that is looked for in the directory is one line and exit 78."""
    (tmp_path / "gone").mkdir()
    here = ("sh", "-c", 'cd gone; rmdir ../gone; exec "$@"', "sh")
    r: Run = await run("run", "app.py", cwd=tmp_path, livekit=False, prefix=here)
    assert await r.exit(START) == 78
    said = [line for line in r.err.read_text().splitlines() if line.startswith("lastcall: ")]
    assert len(said) == 1 and "app.py: the working directory is gone" in said[0], r.logs()
    assert "Traceback" not in r.logs()


async def test_target_that_raises(run: StartRun, tmp_path: Path) -> None:
    """Any other exception is a failed start: their traceback once, back-off, and in the end exit 69.

    An exception may have a text of any length, and a message to the supervisor has a bound. An import that
    takes longer than the period still reaches the limit.
    """
    fails = "def fail():\n    raise ValueError('no key' + 300_000 * 'é')\n\nfail()\n"
    write(tmp_path, "app.py", f"import time\ntime.sleep(1.5)\n{fails}")
    limit = "[restart]\nintensity = 2\nperiod = 1\nbackoff = [0.05, 0.1]\n"
    config = write(tmp_path, "lastcall.toml", limit)
    r: Run = await run("run", "-w", "2", "--config", config, "app.py", cwd=tmp_path, livekit=False)
    assert await r.exit(60) == 69
    failures = [entry for entry in r.log("target failed") if entry["slot"] == 0]
    assert len(failures) == 1
    traceback = failures[0]["traceback"]
    assert traceback.count("Traceback") == 1
    assert "ValueError: no key" in traceback and "target.py" not in traceback
    assert r.receipt()["outcome"] == "gave_up"
    assert "failed to load" in r.receipt()["reason"]
    failed = [entry["slot"] for entry in r.log("slot failed")]
    assert max(failed.count(slot) for slot in (0, 1)) == 3
    await r.nothing_left()


async def test_receipt_to_what_is_no_file(run: StartRun, tmp_path: Path) -> None:
    """A pipe gets the receipt written into it; it is not replaced by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    r: Run = await run("run", "--receipt", str(pipe), "--", "sleep", "600", livekit=False)
    await r.until(lambda: r.log("ready"))
    r.kill()
    assert await r.exit() == 0
    assert json.loads(os.read(reader, 65536))["outcome"] == "clean"
    os.close(reader)
    assert pipe.is_fifo()


CONFIGURATION = {
    "backoff": ("[restart]\nbackoff = [30, 0.5]\n", "expected [first, cap] with first not above cap"),
    "receipt nowhere": ('receipt = "no/such/place"\n', "expected a file in a directory that exists"),
    "receipt a directory": ('receipt = "/"\n', "expected a file, this is a directory"),
    "unknown_key": ("grcae = 3\n", "unknown key 'grcae'; did you mean 'grace'?"),
    "nested_key": ("[stop]\nclse = 3\n", "unknown key 'stop.clse'; did you mean 'close'?"),
    "bad_value": ('grace = "soon"\n', "grace: got 'soon', expected a valid number"),
    "not_toml": ("grace: 3\n", "not TOML"),
    "bad_http": ('http = "8080"\n', "expected HOST:PORT or off"),
    "bad_workers": ("workers = 0\n", "workers: got 0, expected greater than or equal to 1"),
}


@pytest.mark.alone
@pytest.mark.parametrize("case", CONFIGURATION)
async def test_wrong_configuration(run: StartRun, tmp_path: Path, case: str) -> None:
    """Exit 78 within two seconds and one line: the value, what was expected, the nearest right name."""
    text, expected = CONFIGURATION[case]
    config = write(tmp_path, "lastcall.toml", text)
    began = time.monotonic()
    r: Run = await run("run", "--config", config, "app.py", livekit=False)
    assert await r.exit(10) == 78
    assert time.monotonic() - began < 2 + 2
    assert expected in r.err.read_text()
    assert len(r.err.read_text().splitlines()) == 1


COMMAND_LINES = {
    "option": (["run", "--grase", "3", "app.py"], "No such option: --grase"),
    "verb": (["frob"], "No such command 'frob'"),
    "value": (["run", "--grace", "soon", "app.py"], "--grace: got 'soon', expected a valid number"),
    "negative": (["run", "--grace", "-3", "app.py"], "--grace: got '-3', expected greater than 0"),
    "nothing": (["run"], "nothing to run"),
    "no_command": (["run", "--"], "no command after --"),
    "both": (["run", "app.py", "--", "sleep", "1"], "expected one of them"),
}


@pytest.mark.parametrize("case", COMMAND_LINES)
async def test_wrong_command_line(run: StartRun, case: str) -> None:
    """Exit 2 and one line."""
    arguments, expected = COMMAND_LINES[case]
    r: Run = await run(*arguments, command=[*_python(), *arguments], livekit=False)
    assert await r.exit(10) == 2
    assert expected in r.err.read_text()
    assert len(r.err.read_text().splitlines()) == 1


async def test_a_supervisor_imports_what_it_needs(run: StartRun) -> None:
    """It lives for months, and its first worker waits for its imports: no server, no drawing, no livekit."""
    arguments = ["-X", "importtime", "-m", "lastcall", "run", "--http", "127.0.0.1:0", "--", "sleep", "100"]
    r: Run = await run(command=[sys.executable, *arguments], livekit=False)
    await r.until(lambda: r.log("ready"))
    lines = [line for line in r.err.read_text().splitlines() if line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip() for line in lines}
    assert {"lastcall.supervisor.app", "lastcall.supervisor.views.http", "uvloop"} <= loaded
    others = {"aiohttp", "typer", "pydantic", "prometheus_client", "rich.console", "livekit"}
    others |= {f"lastcall.supervisor.{name}" for name in ("picture", "doctor", "rehearsal", "deploy")}
    assert not loaded & others
    r.kill()
    assert await r.exit() == 0


async def test_busy_http_port(run: StartRun) -> None:
    """The workers start, one line says so, and the port is served once it is free; a stop ends the wait."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = ["run", "--http", address, "--", "sleep", "100"]
        r: Run = await run(*arguments, livekit=False)
        await r.until(lambda: r.log("ready"))
        assert [line["http"] for line in r.log("http port is busy")] == [address]
        assert [line["http"] for line in r.log("supervisor started")] == [f"{address} (busy)"]
        second: Run = await run(*arguments, livekit=False)
        await second.until(lambda: second.log("http port is busy"))
        second.kill()
        assert await second.exit() == 0
    await r.until(lambda: r.log("http port is free now"))
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/livez") as response:
        assert response.status == 200
    r.kill()
    assert await r.exit() == 0
    assert len(r.log("http port is busy")) == 1
    await r.nothing_left()


async def test_http_host_that_resolves_slowly(run: StartRun, tmp_path: Path) -> None:
    """The workers start, one line says so, and a lookup that hangs delays no stop."""
    aliases = tmp_path / "aliases"
    os.mkfifo(aliases)  # the C library reads it for a name without a dot, and waits for what never comes
    arguments = ["run", "--http", "slow-host:8080", "--", "sleep", "100"]
    r: Run = await run(*arguments, livekit=False, environment={"HOSTALIASES": str(aliases)})
    await r.until(lambda: r.log("ready"), 30)
    assert [line["http"] for line in r.log("http host is not resolved")] == ["slow-host:8080"]
    assert [line["http"] for line in r.log("supervisor started")] == ["slow-host:8080 (not resolved)"]
    await asyncio.sleep(
        http.RETRY_EVERY + http.RESOLVE_WITHIN
    )  # for another try, which must not say it again
    r.kill()
    assert await r.exit() == 0
    assert len(r.log("http host is not resolved")) == 1
    await r.nothing_left()


async def test_http_is_served_once_the_host_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that is busy then is waited for too, and each reason is said once."""
    loop = asyncio.get_running_loop()
    resolve = loop.getaddrinfo
    answers = ["hang", "again", "answer"]

    async def getaddrinfo(host: str, port: int, **more: Any) -> Any:
        match answers.pop(0) if len(answers) > 1 else answers[0]:
            case "hang":
                await asyncio.Event().wait()
            case "again":
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return await resolve("127.0.0.1", port, **more)

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(http, "RESOLVE_WITHIN", 0.05)
    monkeypatch.setattr(http, "RETRY_EVERY", 0.05)
    log = Silent()
    status: Any = SimpleNamespace()  # /livez asks nothing of it
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"agents.test:{taken.getsockname()[1]}"
        async with asyncio.timeout(30), AsyncExitStack() as stack:
            serving = await stack.enter_async_context(http.serve(address, status, log))
            assert serving == f"{address} (not resolved)"
            while len(log.lines) < 2:
                await asyncio.sleep(0.01)
            taken.close()
            while len(log.lines) < 3:
                await asyncio.sleep(0.01)
            url = f"http://127.0.0.1:{address.rpartition(':')[2]}/livez"
            async with aiohttp.ClientSession() as session, session.get(url) as response:
                assert response.status == 200
    assert [event for event, _ in log.lines] == [
        "http host is not resolved",
        "http port is busy",
        "http port is free now",
    ]


async def test_http_address_of_another_machine(run: StartRun) -> None:
    """Exit 78 and one line; nothing was started. 192.0.2.1 is an address of nobody (RFC 5737)."""
    arguments = ["run", "--http", "192.0.2.1:80", "--", "sleep", "100"]
    r: Run = await run(*arguments, command=[*_python(), *arguments], livekit=False)
    assert await r.exit(10) == 78
    assert "http: 192.0.2.1:80 can't be used: " in r.err.read_text()
    await r.nothing_left()


async def test_unknown_variable_is_a_warning(run: StartRun) -> None:
    """A misspelt LASTCALL_ variable is named with the nearest right one; what Kubernetes injects is not."""
    environment = {"LASTCALL_GRASE": "3", "LASTCALL_SERVICE_HOST": "10.0.0.1", "LASTCALL_PORT": "tcp://x"}
    r: Run = await run("run", "--", "sleep", "100", livekit=False, environment=environment)
    await r.until(lambda: r.log("slot ready"))
    warnings = [line for line in r.err.read_text().splitlines() if "unknown environment variable" in line]
    assert len(warnings) == 1 and "did you mean LASTCALL_GRACE?" in warnings[0]
    r.kill()
    assert await r.exit() == 0


def _python() -> list[str]:
    from tests.support.harness import LASTCALL

    assert os.path.exists(LASTCALL[0])
    return LASTCALL


# Root may look everywhere, unless it gives up these two.
AS_OTHERS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
PLACES = {
    "env file": ({"LASTCALL_ENV_FILE": "locked/a.env"}, [], 78, "env_file: 'locked/a.env' can't be read: "),
    "configuration": ({"LASTCALL_CONFIG": "locked/a.toml"}, [], 78, "locked/a.toml can't be read: "),
    "receipt": (
        {},
        ["--receipt", "locked/r.json"],
        2,
        "--receipt: got 'locked/r.json', expected a file that",
    ),
    "receipt by variable": ({"LASTCALL_RECEIPT": "locked/r"}, [], 78, "LASTCALL_RECEIPT: got 'locked/r', "),
    "control": ({}, ["--control", "locked/c.sock"], 78, "control: locked/c.sock can't be used: "),
    "sockets": ({"XDG_RUNTIME_DIR": "locked"}, [], 78, "control: locked/lastcall can't be made: "),
}


@pytest.mark.parametrize("place", PLACES)
async def test_places_behind_a_locked_directory(run: StartRun, tmp_path: Path, place: str) -> None:
    """One line that names the path and says that the permission is missing; no traceback."""
    environment, options, code, says = PLACES[place]
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    arguments = ["run", "--http", "off", *options, "--", "sleep", "100"]
    command = [*AS_OTHERS, *_python(), *arguments]
    r: Run = await run(command=command, cwd=tmp_path, environment=environment, livekit=False)
    assert await r.exit(START) == code
    said = r.err.read_text()
    assert said.startswith(
        f"lastcall: {says}" if code == 2 or "got" not in says else "lastcall: environment: "
    )
    assert says in said and "Permission denied" in said and said.count("\n") == 1
    locked.chmod(0o700)


async def test_env_file_that_is_a_pipe(run: StartRun, tmp_path: Path) -> None:
    """The worker gets what came through it; a reload that finds no writer is refused, and nothing waits.

    Five seconds without an answer to the workers' signs of life would be taken for a stall.
    """
    pipe = tmp_path / "agent.env"
    os.mkfifo(pipe)
    script = "echo A is $A; exec sleep 600"
    environment = {"LASTCALL_ENV_FILE": str(pipe)}
    r: Run = await run("run", "--", "sh", "-c", script, environment=environment, livekit=False)
    await asyncio.to_thread(pipe.write_text, "A=1\n")
    await r.until(lambda: "A is 1" in r.out.read_text(), 30)
    r.kill(signal.SIGHUP)
    await r.until(lambda: r.log("reload begins"))
    began = time.monotonic()
    from tests.support.program import status

    assert (await status(r))["operations"][-1]["state"] == "running"
    await r.until(lambda: r.log("reload failed"), 20)
    assert time.monotonic() - began < 15
    assert "it has not come to an end within 5 s" in r.log("reload failed")[0]["reason"]
    r.kill(signal.SIGHUP)
    await r.until(lambda: len(r.log("reload begins")) == 2)
    r.kill()
    began = time.monotonic()
    assert await r.exit() == 0
    assert time.monotonic() - began < 4  # the stop does not wait for the pipe
    await r.nothing_left()


async def test_configuration_gone_at_a_reload(run: StartRun, tmp_path: Path) -> None:
    """The reload is refused, and the old values stay, in the next stop too."""
    write(tmp_path, "lastcall.toml", "workers = 3\ngrace = 20\n")
    r: Run = await run("run", "--", "sleep", "600", cwd=tmp_path, livekit=False)
    await r.until(lambda: r.log("ready"), 30)
    (tmp_path / "lastcall.toml").rename(tmp_path / "away")
    (tmp_path / "lastcall.toml").mkdir()
    r.kill(signal.SIGHUP)
    await r.until(lambda: r.log("reload failed"))
    assert "lastcall.toml is a directory" in r.log("reload failed")[0]["reason"]
    (tmp_path / "lastcall.toml").rmdir()
    r.kill(signal.SIGHUP)
    await r.until(lambda: len(r.log("reload failed")) == 2)
    assert "is gone; put it back" in r.log("reload failed")[1]["reason"]
    assert len(r.family()) == 1 + 3
    r.kill()
    assert await r.exit() == 0
    assert r.receipt()["grace"] == 20


async def test_configuration_in_another_locale(run: StartRun, tmp_path: Path) -> None:
    """TOML is UTF-8, whatever the locale says."""
    config = write(tmp_path, "lastcall.toml", "")
    Path(config).write_bytes('command = ["echo", "up"]  # zwölf\n'.encode())
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    r: Run = await run("run", "--config", config, environment=locale, livekit=False)
    await r.until(lambda: "up" in r.out.read_text(), 30)
    r.kill()
    await r.exit()


HTTP = {"name": "my..host:8080", "long": "x" * 64 + ".test:80", "nowhere": "no-such-host.invalid:80"}


@pytest.mark.parametrize("case", HTTP)
async def test_http_host_that_can_not_be(run: StartRun, case: str) -> None:
    """One line, whatever the resolver raises."""
    arguments = ["run", "--http", HTTP[case], "--", "sleep", "100"]
    r: Run = await run(*arguments, command=[*_python(), *arguments], livekit=False)
    assert await r.exit(30) == (78 if case == "nowhere" else 2)
    said = r.err.read_text()
    assert "http: " in said and HTTP[case] in said and said.count("\n") == 1


@pytest.mark.parametrize("limit", [16, 64])
async def test_limit_of_open_files(run: StartRun, limit: int) -> None:
    """Too low for a single worker: exit 78, and one line that names the limit and what is needed."""
    prefix = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh"]
    r: Run = await run("run", "--", "sleep", "100", prefix=prefix, livekit=False)
    assert await r.exit(START) == 78
    said = r.err.read_text()
    assert "open files" in said and "ulimit -n" in said and said.count("\n") == 1
    await r.nothing_left()
