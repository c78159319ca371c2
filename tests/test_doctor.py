"""`lastcall doctor`: each check over made-up facts, and the gathering of the real ones."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from lastcall.supervisor.config import Config
from lastcall.supervisor.doctor import checks, gather, probe, report, trial
from lastcall.supervisor.doctor.facts import Answer, Facts, Finding, Name, ShutdownTarget, Trial, Unit
from lastcall.supervisor.doctor.gather import _http_problem, _own_unit
from lastcall.supervisor.doctor.probe import ask, token
from lastcall.supervisor.doctor.trial import open_to
from lastcall.worker.local.livekit_server import DispatchServer
from tests.support.harness import LASTCALL, SAMPLE, Run, StartRun
from tests.support.proxy import DEAD

NAME = Name(package="Python", version="3.11", name="Popen.poll", needed_by="the fence", without="")
GOOD = Facts(
    target="agent.py",
    names=(NAME,),
    livekit_agents="1.8.9",
    trial=Trial(looked_at=3, worker_bytes=500 << 20, exit_code=0),
    livekit=Answer(url="wss://x", status=101, skew_s=0.2),
)
LESS = replace(NAME, name="A", without="the load reads 0", lack="no A")
MISSING = replace(NAME, name="B", lack="no B")
COLD_AGENT = """
from livekit.agents import JobContext, JobProcess, WorkerOptions, cli

def prewarm(process: JobProcess) -> None:
    raise FileNotFoundError("model.onnx: run download-files first")

async def entrypoint(ctx: JobContext) -> None:
    ctx.shutdown()

if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint, prewarm_fnc=prewarm, num_idle_processes=1))
"""
SHELL = ("/bin/sh", "-c", "lastcall run agent.py")
NOTIFY = {"KillMode": "mixed", "TimeoutStopUSec": "1h 30s", "Type": "notify", "LoadState": "loaded"}


def test_missing_private_names_are_printed() -> None:
    """One a line below its package: what is done without the name. Of the others the number is."""
    lines = report.table((NAME, LESS, MISSING)).splitlines()
    assert lines[1] == "private names of Python 3.11: 1 of 3 are there"
    assert lines[2].startswith("lacks A ") and lines[2].endswith(" no A: the load reads 0")
    assert lines[3].startswith("lacks B ") and lines[3].endswith(" no B: not supported")
    assert "--json" in lines[4]


def test_a_key_that_may_not_dispatch() -> None:
    """It matters where calls are handed over, and is not asked of a server that lets no worker in."""
    less = Answer(url="u", status=101, dispatch_status=403)
    for facts, verdicts in (
        (replace(GOOD, livekit=less), ["warn"]),
        (replace(GOOD, livekit=less, hands_over=False), []),
        (replace(GOOD, livekit=replace(less, status=401)), []),
    ):
        assert [each.verdict for each in checks.examine(facts) if each.check == "handover"] == verdicts


def unit(**changes: str) -> Unit:
    return Unit(name="lastcall.service", properties=NOTIFY | changes)


def targets(timeout: str) -> tuple[ShutdownTarget, ...]:
    """Return the targets as systemd 252 has them: halt.target has no limit."""
    return (
        ShutdownTarget(name="poweroff.target", timeout=timeout, action="poweroff-force"),
        ShutdownTarget(name="reboot.target", timeout=timeout, action="reboot-force"),
        ShutdownTarget(name="halt.target", timeout="infinity", action="none"),
    )


def test_nothing_wrong() -> None:
    """Every check has something to say, or nothing to say it about; none of it is bad."""
    findings = checks.examine(GOOD)
    assert {finding.verdict for finding in findings} == {"ok"}
    assert all(finding.why and not finding.do for finding in findings)
    assert report.document(findings, (NAME,))["ok"] is True


CASES: list[tuple[str, str, dict[str, Any], str]] = [
    ("configuration", "fail", {"config_error": "grace: got 'x'"}, "grace: got 'x'"),
    ("grace", "warn", {"grace": 20.0}, "callbacks may not run"),
    ("pid 1", "ok", {"pid": 1, "init": ("lastcall",)}, "lastcall is PID 1"),
    ("pid 1", "ok", {"init": ("/opt/venv/bin/python", "/opt/venv/bin/lastcall", "run")}, "lastcall is PID 1"),
    ("pid 1", "fail", {"init": SHELL, "in_container": True}, "is a shell"),
    (
        "pid 1",
        "ok",
        {"init": ("/sbin/tini", "--", "lastcall-x"), "in_container": True},
        "passes the signal on",
    ),
    (
        "pid 1",
        "fail",
        {"init": ("catatonit", "--", *SHELL), "init_children": (SHELL,)},
        "below catatonit a shell",
    ),
    ("pid 1", "ok", {"init": ("tini", "sh"), "init_children": (("sh",),)}, "passes the signal on"),
    ("pid 1", "warn", {"init": ("supervisord",), "in_container": True}, "not known"),
    ("unit", "ok", {"unit": unit()}, "stops within 3630 s"),
    ("unit", "ok", {"unit": unit(TimeoutStopUSec="infinity")}, "stops within inf s"),
    (
        "unit",
        "warn",
        {"unit": unit(TimeoutStopUSec="1min 30s")},
        "TimeoutStopSec=90, grace is 3600 s; lastcall",
    ),
    ("unit", "fail", {"unit": unit(TimeoutStopUSec="1min 30s", Type="exec")}, "systemd would cut calls"),
    ("unit", "fail", {"unit": unit(KillMode="process")}, "KillMode=process"),
    ("unit", "fail", {"unit": unit(KillSignal="3")}, "KillSignal=3"),
    ("unit", "ok", {"unit": unit(KillSignal="2")}, "stops within"),
    (
        "unit",
        "fail",
        {"unit": unit(OOMPolicy="stop")},
        "OOMPolicy=stop: one call out of memory ends the unit",
    ),
    ("shutdown", "ok", {"shutdown_targets": targets("1h 5min 30s")}, "by force after 3930 s"),
    ("shutdown", "ok", {"shutdown_targets": targets("30min"), "grace": 600.0}, "by force after 1800 s"),
    (
        "shutdown",
        "fail",
        {"shutdown_targets": targets("30min")},
        "after 1800 s (poweroff.target, reboot.target)",
    ),
    ("unit", "fail", {"unit": unit(NotifyAccess="none")}, "NotifyAccess=none"),
    ("unit", "warn", {"unit": unit(TimeoutStopUSec="1h", Type="exec")}, "0 s after grace is over"),
    ("unit", "fail", {"unit": unit(LoadState="not-found")}, "not loaded (not-found)"),
    ("kill timer", "fail", {"environment": {"K_SERVICE": "x"}, "grace": 60.0}, "Cloud Run kills after 10 s"),
    (
        "kill timer",
        "fail",
        {"environment": {"ECS_CONTAINER_METADATA_URI_V4": "x"}},
        "ECS kills after 120 s at most",
    ),
    (
        "kill timer",
        "warn",
        {"environment": {"KUBERNETES_SERVICE_HOST": "x"}},
        "Kubernetes kills after 30 s unless",
    ),
    ("kill timer", "warn", {"in_container": True}, "kills after 10 s unless told otherwise"),
    ("kill timer", "fail", {"environment": {"LASTCALL_PLATFORM_GRACE": "600"}}, "calls would be cut"),
    ("kill timer", "warn", {"environment": {"LASTCALL_PLATFORM_GRACE": "3605"}}, "5 s after grace is over"),
    ("kill timer", "ok", {"environment": {"LASTCALL_PLATFORM_GRACE": "3630"}}, "kills after 3630 s"),
    ("kill timer", "fail", {"environment": {"LASTCALL_PLATFORM_GRACE": "soon"}}, "'soon', no number"),
    ("livekit-agents", "fail", {"livekit_agents": None}, "not installed"),
    ("livekit-agents", "warn", {"livekit_agents": None, "target": ""}, "only opaque workers"),
    ("livekit-agents", "fail", {"livekit_agents": "1.3.11"}, "older than 1.3.12"),
    ("livekit-agents", "ok", {"livekit_agents": "1.3.12"}, "accepted during the drain"),
    ("livekit-agents", "ok", {"livekit_agents": "1.5.7"}, "blocked request_fnc"),
    ("livekit-agents", "ok", {"livekit_agents": "1.8.9"}, "process group cuts every call"),
    ("livekit-agents", "warn", {"livekit_agents": "2.0.0rc1"}, "newer than 1.8.9"),
    ("shield", "warn", {"trial": None}, "no TARGET"),
    ("shield", "fail", {"trial": Trial(error="no file 'x'")}, "no file 'x'"),
    (
        "shield",
        "fail",
        {"trial": Trial(looked_at=2, open_to={"job (pid 7)": ("SIGTERM",)})},
        "job (pid 7) to SIGTERM",
    ),
    ("shield", "fail", {"trial": Trial(looked_at=2, exit_code=75)}, "exit code 75"),
    (
        "shield",
        "fail",
        {"trial": Trial(looked_at=2, exit_code=75, stop="forced after 61.0 s, closing 25.0 s")},
        "ended with exit code 75 (forced after 61.0 s, closing 25.0 s)",
    ),
    ("shield", "fail", {"trial": Trial(looked_at=2)}, "was not over in time"),
    ("kill timer", "ok", {"in_container": True, "unit": unit()}, "systemd is the platform"),
    ("shield", "warn", {"trial": Trial(exit_code=0)}, "none could be looked at"),
    ("memory", "ok", {"memory_limit": 2 << 30}, "limit 2.0 GiB; 1 x 0.49 GiB"),
    ("memory", "warn", {"memory_limit": 900 << 20}, "0.49 GiB before the first call"),
    ("memory", "fail", {"memory_limit": 900 << 20, "workers": 2}, "2 x 0.49 GiB"),
    ("memory", "ok", {"memory_limit": 1 << 30, "trial": None}, "not known without TARGET"),
    ("out of memory", "ok", {"dies_as_group": False}, "kills one process"),
    ("out of memory", "warn", {"dies_as_group": True}, "kills every call"),
    ("out of memory", "ok", {"dies_as_group": True, "job_memory_mb": 900}, "a job is ended at 900 MB"),
    ("out of memory", "warn", {"job_memory_mb": 900, "memory_limit": 900 << 20}, "is never reached"),
    ("limits", "warn", {"open_files": 512}, "only 512 open files"),
    ("limits", "fail", {"open_files": 64}, "only 64 open files"),
    ("limits", "warn", {"processes_limit": 100}, "only 100 processes"),
    ("clock", "ok", {"livekit": None}, "compared with nothing"),
    ("clock", "warn", {"livekit": Answer(url="u", status=101, skew_s=30.0)}, "30 s behind"),
    ("clock", "fail", {"livekit": Answer(url="u", status=401, skew_s=-90.0)}, "90 s ahead of"),
    ("livekit", "warn", {"livekit": None}, "not all set"),
    ("private names", "fail", {"names": None}, "can't be imported"),
    ("private names", "fail", {"names": (LESS, MISSING)}, "no B, which the fence needs, and 1 more"),
    ("private names", "warn", {"names": (LESS,)}, "no A: the load reads 0"),
    ("livekit", "fail", {"livekit": Answer(url="u", error="refused")}, "u: refused"),
    ("livekit", "fail", {"livekit": Answer(url="u", status=401)}, "refuses the key (401)"),
    ("livekit", "fail", {"livekit": Answer(url="u", status=404)}, "answers 404"),
    ("handover", "warn", {"livekit": Answer(url="u", status=101, dispatch_status=401)}, "may not dispatch"),
    ("inworld", "ok", {"has_inworld_plugin": True, "has_inworld_key": True}, "a key is there"),
    ("inworld", "warn", {"has_inworld_plugin": True}, "INWORLD_API_KEY is not set"),
    ("places", "fail", {"http_problem": "http x can't be used"}, "http x can't be used"),
    ("load", "ok", {"workers": 4}, "the 4 workers have one load and are full at the same moment"),
    (
        "processes",
        "fail",
        {"process_failures": ("3 job processes of slot 0 did not get ready, the last: no model",)},
        "the last: no model",
    ),
    (
        "image",
        "warn",
        {"image_limits": ("it leaves watchdog out: it has started a thread",)},
        "it leaves watchdog out",
    ),
    ("places", "fail", {"place_problems": ("receipt: /x can't be written",)}, "receipt: /x"),
]


@pytest.mark.parametrize(("check", "verdict", "facts", "why"), CASES)
def test_check(check: str, verdict: str, facts: dict[str, Any], why: str) -> None:
    """A check says its verdict and why, and what to do if anything; the exit code follows."""
    findings = checks.examine(replace(GOOD, **facts))
    (finding,) = [finding for finding in findings if finding.check == check]
    assert (finding.verdict, why in finding.why) == (verdict, True), finding
    assert bool(finding.do) is (verdict != "ok")
    assert "\n" not in finding.why + finding.do
    assert report.document(findings, ())["ok"] is all(each.verdict != "fail" for each in findings)


HEX = "0123456789ab" * 5


@pytest.mark.parametrize(
    ("environment", "init", "init_environment", "cgroups", "is_one"),
    [
        ({"container": "podman"}, "", "", "", True),
        ({}, "systemd", "PATH=/bin\0container=systemd-nspawn", "", True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "", "", "", True),
        # A read-only Podman container, with a cgroup namespace: only PID 1 tells.
        ({}, "/opt/venv/bin/python", "", "0::/\n", True),
        ({}, "/usr/bin/catatonit", "", "0::/\n", True),
        ({}, "", "", f"0::/system.slice/docker-{HEX}.scope\n", True),
        ({}, "", "", f"4:memory:/docker/{HEX}\n", True),
        ({}, "", "", f"0::/machine.slice/libpod-{HEX}.scope/container\n", True),
        ({}, "", "", f"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-{HEX}.scope\n", True),
        ({}, "", "", f"0::/ecs/{HEX}\n", True),
        ({}, "", "", f"5:cpu:/system.slice:docker:{HEX}\n0::/\n", True),
        ({}, "", "", f"0::/libpod_parent/libpod-{HEX}\n", True),
        ({}, "", "", "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod1.slice\n", True),
        ({}, "", "", "0::/kubepods/burstable/pod1\n", True),
        ({}, "", "", "0::/lxc.payload.agents/system.slice/lastcall.service\n", True),
        ({}, "", "", "0::/machine.slice\n", True),
        ({}, "/lib/systemd/systemd", "", "0::/user.slice/user-1000.slice/session-2.scope\n", False),
        ({}, "/sbin/init", "PATH=/bin", "0::/system.slice/lastcall.service\n", False),
        ({}, "systemd", "", "0::/system.slice/docker.service\n0::/system.slice/containerd.service", False),
        ({}, "", "", "0::/system.slice/docker-agent.service\n", False),
        ({}, "", "", "0::/system.slice/container-agent.service\n", False),
        ({}, "", "", "0::/system.slice/lxc-net.service\n0::/system.slice/kubepods-agent.service\n", False),
        ({}, "", "", f"0::/system.slice/my-docker-{HEX}.service\n", False),
        ({}, "", "", "", False),
    ],
)
def test_container(
    environment: dict[str, str], init: str, init_environment: str, cgroups: str, is_one: bool
) -> None:
    """Each sign alone is enough; services that manage containers are no containers."""
    words = (init,) if init else ()
    assert checks.is_container(environment, words, init_environment, cgroups) is is_one


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1h 30s", 3630.0), ("1min 30s", 90.0), ("500ms", 0.5), ("infinity", float("inf")), ("2d", 172800.0)],
)
def test_time_spans_of_systemd(text: str, expected: float) -> None:
    """As `systemctl show` prints them."""
    assert checks.span(text) == pytest.approx(expected)


def test_own_unit_is_found_in_the_cgroup() -> None:
    """The innermost service; the manager of a user's session is none."""
    assert _own_unit("0::/system.slice/lastcall.service\n") == "lastcall.service"
    assert _own_unit("0::/user.slice/user-1.slice/user@1.service/app.slice/bot.service\n") == "bot.service"
    assert _own_unit("0::/user.slice/user-1.slice/user@1.service/session.scope\n") == ""


def test_memory_files_of_cgroup_v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group set anywhere from the own cgroup up to the root kills together; cgroup v1 has no such file."""
    monkeypatch.setattr(gather, "CGROUPS", tmp_path)
    monkeypatch.setattr(gather, "_read", lambda path: read(Path(path)))

    def read(path: Path) -> str:
        if path == Path("/proc/self/cgroup"):
            return "0::/pod/app\n"
        return path.read_text() if path.exists() else ""

    (tmp_path / "pod" / "app").mkdir(parents=True)
    assert gather._dies_as_group() is None
    own, above = tmp_path / "pod" / "app" / "memory.oom.group", tmp_path / "pod" / "memory.oom.group"
    own.write_text("0\n")
    above.write_text("0\n")
    assert gather._dies_as_group() is False
    above.write_text("1\n")
    assert gather._dies_as_group() is True
    (tmp_path / "pod" / "memory.max").write_text("max\n")
    assert gather._limit("memory.max") is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert gather._limit("memory.max") == 1000


async def test_livekit_is_asked_as_a_worker_asks() -> None:
    """A right key is let in, a wrong one refused; no worker appears at the server, registered or not."""
    async with DispatchServer() as server:
        answer = await asyncio.to_thread(ask, server.environment)
        assert answer is not None and (answer.status, answer.error) == (101, "")
        assert answer.skew_s is not None and abs(answer.skew_s) < 5
        assert answer.dispatch_status == 503, "as of a room that is not there"
        server.may_dispatch = False
        less = await asyncio.to_thread(ask, server.environment)
        assert less is not None and (less.status, less.dispatch_status) == (101, 401)
        assert not list(server.rooms.state), "the question makes no room"
        wrong = await asyncio.to_thread(ask, server.environment | {"LIVEKIT_API_SECRET": "x" * 40})
        assert wrong is not None and wrong.status == 401
        assert wrong.skew_s is not None and abs(wrong.skew_s) < 5
        assert server.counts["registered"] == 0 and not server.available()
    gone = await asyncio.to_thread(ask, server.environment)
    assert gone is not None and "refused" in gone.error.lower()
    assert ask({}) is None
    for url in (
        "example",
        "ws://[::1",
        "ws://user:password@?token=password",
        "ws://user:password/x@h:1/?password",
    ):
        odd = ask({"LIVEKIT_URL": url, "LIVEKIT_API_KEY": "k", "LIVEKIT_API_SECRET": "s"})
        assert odd is not None and odd.error and "password" not in odd.url + odd.error


@pytest.mark.parametrize(
    ("says", "error"),
    [
        (b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: AAAA\r\n\r\n", "not to a WebSocket"),
        (b"\x1b[2J\x00 no HTTP\r\n", "no HTTP"),
        (b"HTTP/1.1 101 Swi", "no answer within"),  # and a byte now and then, for ever
    ],
)
def test_livekit_that_is_no_livekit(says: bytes, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is one line, in time, with nothing in it that a terminal would obey."""
    monkeypatch.setattr(probe, "TIMEOUT", 2.0)
    drip = f"""
import socket, time
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
while True:
    client, _ = server.accept()
    client.recv(65536)
    client.sendall({says!r})
    try:
        for _ in range({600 if error == "no answer within" else 0}):
            time.sleep(0.2)
            client.sendall(b"x")
    except OSError:
        pass
    client.close()
"""
    with subprocess.Popen([sys.executable, "-c", drip], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = f"ws://127.0.0.1:{int(server.stdout.readline())}"
            answer = ask({"LIVEKIT_URL": url, "LIVEKIT_API_KEY": "k", "LIVEKIT_API_SECRET": "s"})
            assert answer is not None and answer.status == 0
            assert error in answer.error and answer.error.isprintable()
        finally:
            server.kill()


async def test_a_server_that_tells_no_time() -> None:
    """It lets the worker in; that a second question is not answered says nothing against it."""

    async def let_in(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        return socket

    async def hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    app = web.Application()
    app.add_routes([web.get("/agent", let_in), web.get("/", hang_up)])
    async with TestServer(app) as server:
        credentials = {"LIVEKIT_API_KEY": "k", "LIVEKIT_API_SECRET": "s" * 32}
        answer = await asyncio.to_thread(ask, {"LIVEKIT_URL": str(server.make_url("")), **credentials})
    assert answer is not None
    assert (answer.status, answer.error, answer.skew_s) == (101, "", None)


async def test_a_server_that_never_closes() -> None:
    """A server that lets the worker in and then says nothing more has answered."""
    closed = asyncio.Event()

    async def let_in(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(autoclose=False)
        await socket.prepare(request)
        await closed.wait()
        return socket

    app = web.Application()
    app.add_routes([web.get("/agent", let_in)])
    async with TestServer(app) as server:
        credentials = {"LIVEKIT_API_KEY": "k", "LIVEKIT_API_SECRET": "s" * 32}
        answer = await asyncio.to_thread(ask, {"LIVEKIT_URL": str(server.make_url("")), **credentials})
        closed.set()
    assert answer is not None and (answer.status, answer.error) == (101, "")
    assert answer.skew_s is not None and abs(answer.skew_s) < 5


def test_token_is_what_livekit_verifies() -> None:
    """LiveKit's own verifier takes it, with the agent grant."""
    from livekit import api

    claims = api.TokenVerifier("key", "secret" * 6).verify(token("key", "secret" * 6))
    assert claims.video is not None and claims.video.agent


def test_open_processes_are_seen() -> None:
    """A program with default dispositions is open to both; one that ignores SIGTERM only to the other."""
    program = "import signal, sys; {}; print('up', flush=True); sys.stdin.read()"
    seen = []
    for line in ("pass", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"):
        with subprocess.Popen(
            [sys.executable, "-c", "import signal; signal.signal(2, signal.SIG_DFL);" + program.format(line)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            seen.append(open_to(process.pid))
            process.kill()
    assert seen == [("SIGTERM", "SIGINT"), ("SIGINT",)]
    assert open_to(2**22 + 1) == ()


def doctor(*arguments: str, cwd: Path, **environment: str) -> tuple[int, dict[str, Finding]]:
    foreign = ("LASTCALL", "LIVEKIT_API_", "LIVEKIT_URL")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    done = subprocess.run(
        [*LASTCALL, "doctor", *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=cwd,
        env={**clean, **environment},
        check=False,
    )
    assert done.stderr == "", done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] is (done.returncode == 0)
    return done.returncode, {entry["check"]: Finding(**entry) for entry in document["findings"]}


def test_a_worker_and_its_surroundings_are_looked_at(tmp_path: Path) -> None:
    """A real worker is started, looked at and stopped; its measured size is held against the limit.

    The private names are looked for beside it. The worker reaches the server of the trial past any proxy. A
    taken port and a kill timer below grace: exit 1, each named.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        options = ("--http", address, "--grace", "700")
        code, findings = doctor(SAMPLE, *options, cwd=tmp_path, LASTCALL_PLATFORM_GRACE="600", **DEAD)
    assert findings["shield"].verdict == "ok", findings
    assert "processes of a worker looked at" in findings["shield"].why
    assert findings["livekit-agents"].verdict in ("ok", "warn")
    assert findings["private names"].verdict == "ok" and "all " in findings["private names"].why
    assert code == 1
    assert findings["places"].verdict == "fail" and address in findings["places"].why
    assert findings["kill timer"].verdict == "fail" and "600 s" in findings["kill timer"].why


def test_a_worker_that_never_gets_warm(tmp_path: Path) -> None:
    """A target whose prewarm raises fails, with the agent's own reason."""
    (tmp_path / "agent.py").write_text(COLD_AGENT)
    finding = checks.shield(replace(GOOD, trial=trial.look(str(tmp_path / "agent.py"))))
    assert finding.verdict == "fail" and not report.document([finding], ())["ok"]
    assert "first job process did not get ready" in finding.why
    assert "model.onnx: run download-files first" in finding.why


def test_places_that_can_not_be(tmp_path: Path) -> None:
    """A file in the place of the control socket, and a path that is too long for a socket, are named."""
    for control in (__file__, f"/tmp/{'x' * 110}"):
        config = Config(control=control, receipt=str(tmp_path / "receipt.json"))
        (problem,) = gather._place_problems(config)
        assert problem.startswith(f"control: {control} ")


def test_wrong_configuration_is_a_finding(tmp_path: Path) -> None:
    """A file with a wrong key is named; what does not depend on it is checked all the same.

    Without a target no worker is looked at, which is a warning.
    """
    (tmp_path / "lastcall.toml").write_text("gracee = 5\n")
    code, findings = doctor("--http", "off", cwd=tmp_path)
    assert code == 1
    assert "gracee" in findings["configuration"].why
    assert "limits" in findings
    assert findings["shield"].verdict == "warn"


def test_wrong_option_is_a_wrong_command_line(tmp_path: Path) -> None:
    """A bad flag is exit code 2, as for run."""
    done = subprocess.run(
        [*LASTCALL, "doctor", "--grace", "soon"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "--grace: got 'soon'" in done.stderr and done.stderr.count("\n") == 1


async def test_the_port_of_a_running_lastcall_is_its_own(run: StartRun, tmp_path: Path) -> None:
    """Doctor in a container beside the supervisor finds its port in use by lastcall, which is well."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    r: Run = await run("run", "--http", address, "--", "sleep", "600", livekit=False)
    await r.until(lambda: r.log("supervisor started"))
    assert await asyncio.to_thread(_http_problem, address) == ""
    r.kill()
    assert await r.exit() == 0
    assert await asyncio.to_thread(_http_problem, address) == ""
