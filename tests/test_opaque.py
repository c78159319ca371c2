"""Opaque workers: the process side alone. Fast, because nothing of livekit is in it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.support.harness import LASTCALL, Run, StartRun, lives
from tests.support.program import DEAF, POLITE, polite

PY = sys.executable
ORPHANS = """
import os, time, sys
for _ in range(100):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(0.2)
            os._exit(0)
        os._exit(0)
    os.wait()
print("up", flush=True)
time.sleep(600)
"""
FAST = "[restart]\nintensity = 3\nbackoff = [0.02, 0.1]\n"


async def test_one_sigterm_and_time(run: StartRun) -> None:
    """It gets exactly one SIGTERM, however often the supervisor does, and all the time it needs."""
    r: Run = await run("run", "--grace", "20", *polite(1.0), livekit=False)
    await r.until(lambda: "up" in r.out.read_text())
    for _ in range(5):
        r.kill()
        await asyncio.sleep(0.1)
    assert await r.exit() == 0
    assert "terms 1" in r.out.read_text()
    assert r.receipt()["outcome"] == "clean"
    await r.nothing_left()


@pytest.mark.alone
async def test_deadline(run: StartRun) -> None:
    """One that never ends is killed in time, which is a reason for 75."""
    r: Run = await run("run", "--grace", "2", "--", PY, "-c", DEAF, livekit=False)
    await r.until(lambda: "up" in r.out.read_text())
    began = time.monotonic()
    r.kill()
    assert await r.exit() == 75
    assert time.monotonic() - began < 2 + 2
    receipt = r.receipt()
    assert receipt["outcome"] == "forced" and receipt["seconds"] <= 2.5
    assert [killed["what"] for killed in receipt["killed"]] == ["worker"]
    await r.nothing_left()


async def test_dies_at_once(run: StartRun) -> None:
    """A worker that can't be kept up: back-off, quarantine, exit 69, and a receipt that says so."""
    r: Run = await run("run", "-w", "2", *_config(FAST), "--", "false", livekit=False)
    assert await r.exit(20) == 69
    receipt = r.receipt()
    assert (receipt["outcome"], receipt["exit_code"]) == ("gave_up", 69)
    assert receipt["reason"].endswith("exit code 1")
    assert len(r.log("slot quarantined")) == 2
    assert all(entry["delay"] == 0 for entry in r.log("slot backoff")[:1])


def _config(text: str) -> list[str]:
    import tempfile

    directory = tempfile.mkdtemp()
    path = Path(directory) / "lastcall.toml"
    path.write_text(text)
    return ["--config", str(path)]


async def test_exit_code_zero_is_a_failure_too(run: StartRun) -> None:
    """An exit nobody asked for is restarted, also when the program thought that all was well."""
    r: Run = await run("run", *_config(FAST), "--", "true", livekit=False)
    assert await r.exit(20) == 69
    assert {entry["reason"] for entry in r.log("slot failed")} == {"exit code 0"}


async def test_no_such_program(run: StartRun) -> None:
    """A command that can't be found is a wrong target."""
    r: Run = await run("run", "--", "no-such-program-here", livekit=False)
    assert await r.exit(10) == 78
    assert "'no-such-program-here'" in r.err.read_text()


async def test_sigterm_during_backoff(run: StartRun) -> None:
    """Nothing runs, so nothing is waited for."""
    slow = "[restart]\nintensity = 50\nbackoff = [20, 20]\n"
    r: Run = await run("run", *_config(slow), "--", "false", livekit=False)
    await r.until(lambda: len(r.log("slot backoff")) >= 2)
    r.kill()
    began = time.monotonic()
    assert await r.exit() == 0
    assert time.monotonic() - began < 10, "the backoff is 20 s"
    assert r.receipt()["outcome"] == "clean"


async def test_restart_after_a_crash(run: StartRun) -> None:
    """SIGKILL of the child: another one, at once."""
    r: Run = await run("run", *polite(), livekit=False)
    await r.until(lambda: "up" in r.out.read_text())
    (child,) = psutil.Process(r.pid).children()
    child.kill()
    await r.until(lambda: r.out.read_text().count("up") == 2)
    assert r.log("slot failed")[0]["reason"] == "killed by SIGKILL"
    r.kill()
    assert await r.exit() == 0


async def test_a_stubborn_grandchild(run: StartRun) -> None:
    """A descendant in a new session that ignores SIGTERM is swept, at a crash and at the stop."""
    script = (
        "import subprocess,sys,time\n"
        f"p=subprocess.Popen([sys.executable,'-c',{DEAF!r}],start_new_session=True,stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print('child', p.pid, flush=True); time.sleep(600)\n"
    )
    r: Run = await run("run", "--grace", "10", "--", PY, "-c", script, livekit=False)
    await r.until(lambda: "child" in r.out.read_text())
    first = int(r.out.read_text().split()[1])
    (worker,) = psutil.Process(r.pid).children()
    worker.kill()
    await r.until(lambda: r.out.read_text().count("child") == 2)
    assert not lives(first)
    r.kill()
    assert await r.exit() == 0
    assert r.receipt()["swept"] == 2
    await r.nothing_left()


async def test_adopted_orphans_are_reaped(run: StartRun) -> None:
    """A hundred orphans end under us: none stays a zombie."""
    r: Run = await run("run", "--grace", "5", "--", PY, "-c", ORPHANS, livekit=False)
    await r.until(lambda: "up" in r.out.read_text())
    await r.until(lambda: len(psutil.Process(r.pid).children()) == 1)
    r.kill()
    assert await r.exit() == 0


@pytest.mark.pid1
async def test_as_pid_1(run: StartRun, tmp_path: Path) -> None:
    """PID 1 of a namespace, with a hundred orphans: all reaped, SIGTERM drains, exit code passed on."""
    if not _can_unshare():
        pytest.skip("no new pid namespace can be made here")
    receipt = tmp_path / "receipt"
    script = ORPHANS.replace("time.sleep(600)", POLITE.format(after=0.5))
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--", *LASTCALL]
    command += ["run", "--http", "off", "--control", str(tmp_path / "c"), "--receipt", str(receipt)]
    r: Run = await run(command=[*command, "--", PY, "-c", script], livekit=False)
    await r.until(lambda: r.out.read_text().count("up") == 2, 20)
    children = Path(f"/proc/{r.pid}/task/{r.pid}/children")
    init = psutil.Process(int(children.read_text().split()[0]))
    await r.until(lambda: len(init.children()) == 1)
    init.send_signal(signal.SIGTERM)
    assert await r.exit() == 0
    assert json.loads(receipt.read_text())["pid"] == 1
    assert "terms 1" in r.out.read_text()
    await r.nothing_left()


@pytest.mark.parametrize("how", ["closed", "never_read"])
async def test_output_that_nobody_takes(run: StartRun, how: str) -> None:
    """Neither a closed nor a full standard output keeps a worker from working or a stop from ending."""
    shout = "import sys,signal\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    shout += "n=0\nwhile True:\n    print('x'*1000); n+=1\n"
    shout += "    if n==20000: print('done', file=sys.stderr, flush=True); signal.pause()\n"
    read, write = os.pipe()
    try:
        r: Run = await run("run", "--grace", "10", "--", PY, "-c", shout, livekit=False, stdout=write)
        os.close(write)
        if how == "closed":
            os.close(read)
        await r.until(lambda: "done" in r.err.read_text(), 20)
        r.kill()
        assert await r.exit() == 0
    finally:
        if how == "never_read":
            os.close(read)


async def test_http(run: StartRun, tmp_path: Path) -> None:
    """/livez, /readyz, /status and /metrics, before, during and after."""
    r: Run = await run("run", "--http", "127.0.0.1:0", "--grace", "10", *polite(1.0), livekit=False)
    await r.until(lambda: r.log("slot ready"))
    address = r.log("supervisor started")[0]["http"]
    assert await _get(address, "/livez") == (200, "ok\n")
    assert await _get(address, "/readyz") == (200, "ok\n")
    code, text = await _get(address, "/status")
    document = json.loads(text)
    assert (code, document["schema"], document["phase"]) == (200, 1, "running")
    assert document["slots"][0]["state"] == "ready"
    code, text = await _get(address, "/metrics")
    assert code == 200 and 'lastcall_slots{state="ready"} 1.0' in text
    assert "lastcall_jobs_to_cut" not in text and "lastcall_drain_left_seconds" not in text
    shown = subprocess.run(
        [*LASTCALL, "status", "--json", "--control", str(r.control)],
        capture_output=True,
        timeout=10,
        check=True,
    )
    assert json.loads(shown.stdout)["slots"][0]["pid"] == document["slots"][0]["pid"]
    await r.until(lambda: "up" in r.out.read_text())
    r.kill()
    await r.until(lambda: r.log("stop draining"))
    assert (await _get(address, "/livez"))[0] == 200
    code, text = await _get(address, "/readyz")
    assert code == 503 and "stopping (draining): SIGTERM" in text
    assert await r.exit() == 0


async def test_status_without_a_supervisor(run: StartRun, tmp_path: Path) -> None:
    """One line with the socket's path, exit 69."""
    path = str(tmp_path / "none.sock")
    arguments = ["status", "--control", path]
    r: Run = await run(command=[*LASTCALL, *arguments], livekit=False)
    assert await r.exit(10) == 69
    assert path in r.err.read_text() and len(r.err.read_text().splitlines()) == 1


async def test_control_socket_is_private(run: StartRun) -> None:
    """Mode 0600; garbage and silence harm nobody."""
    import socket

    r: Run = await run("run", *polite(), livekit=False)
    await r.until(lambda: r.log("slot ready"))
    assert r.control.stat().st_mode & 0o777 == 0o600
    silent = socket.socket(socket.AF_UNIX)
    silent.connect(str(r.control))
    with socket.socket(socket.AF_UNIX) as noisy:
        noisy.connect(str(r.control))
        noisy.sendall(b"\x00garbage" * 10_000 + b"\n")
    shown = subprocess.run(
        [*LASTCALL, "status", "--control", str(r.control)], capture_output=True, timeout=10, check=True
    )
    assert shown.returncode == 0 and b"ready" in shown.stdout
    silent.close()
    await r.until(lambda: "up" in r.out.read_text())
    r.kill()
    assert await r.exit() == 0


async def test_other_signals(run: StartRun) -> None:
    """A signal that can't be obeyed by an opaque worker, or not now, is logged and ends nothing."""
    r: Run = await run("run", *polite(), livekit=False)
    await r.until(lambda: "up" in r.out.read_text() and r.log("slot ready"))
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTOU):
        os.kill(r.pid, number)
    await r.until(lambda: len(r.log("signal ignored")) == 2)
    assert r.process.poll() is None
    r.kill()
    assert await r.exit() == 0


async def _get(address: str, path: str) -> tuple[int, str]:
    def get() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(get)


def _can_unshare() -> bool:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("turn", range(6))
async def test_every_process_is_signalled(run: StartRun, turn: int) -> None:
    """A platform that signals every process ends workers in the moment of the fence: still a clean stop."""
    r = await run("run", "-w", "3", "--grace", "20", "--", "sleep", "1000", livekit=False)
    await r.until(lambda: len(r.log("slot ready")) == 3)
    r.kill_all()
    assert await r.exit() == 0
    receipt = r.receipt()
    assert (receipt["outcome"], receipt["killed"], receipt["fault"]) == ("clean", [], "")
    await r.nothing_left()
