"""The control socket: the users that it answers, and the bad clients that it survives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.support.harness import LASTCALL, Run, StartRun, lives
from tests.support.program import Program, status
from tests.support.terminal import Terminal


def connect(r: Run) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(r.control))
    return sock


async def test_socket_bears_garbage_and_slow_clients(run: StartRun, program: Program) -> None:
    """Nonsense, silence, an endless line and a client that never reads keep nobody else from an answer."""
    r: Run = await run("run", *program.arguments, livekit=False)
    await r.until(lambda: r.log("ready"))
    assert os.stat(r.control).st_mode & 0o777 == 0o600
    silent = [connect(r) for _ in range(10)]
    garbage = connect(r)
    garbage.sendall(b"\xff\x00 what\n")
    assert b'"ok": false' in await asyncio.to_thread(garbage.recv, 65536)
    endless = connect(r)
    with pytest.raises(OSError):
        for _ in range(1000):
            await asyncio.to_thread(endless.sendall, b"x" * 65536)
    never_reads = connect(r)
    never_reads.sendall(b'{"v": 1, "verb": "status"}\n')
    wrong_version = connect(r)
    wrong_version.sendall(b'{"v": 9, "verb": "status"}\n')
    assert b"version 9" in await asyncio.to_thread(wrong_version.recv, 65536)
    both = await asyncio.gather(status(r), status(r))
    assert both[0]["pid"] == both[1]["pid"] == r.pid
    for sock in (*silent, garbage, endless, never_reads, wrong_version):
        sock.close()
    r.kill()
    assert await r.exit() == 0
    assert not r.control.exists()


STRANGER = """
import os, socket, sys
os.setgid(65534)
os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
print("connected")
try:
    sock.sendall(b'{"v": 1, "verb": "drain"}\\n')
    answer = sock.recv(100)
except OSError:
    answer = b""
print(answer or "no answer")
"""


async def test_stale_socket_is_taken_over_and_a_live_one_is_not(run: StartRun, program: Program) -> None:
    """The socket of a killed supervisor is replaced. On a live socket a second supervisor ends with 78."""
    r: Run = await run("run", *program.arguments, livekit=False)
    await r.until(lambda: r.log("ready"))
    r.kill(signal.SIGKILL)
    r.process.wait()
    assert r.control.exists()
    second: Run = await run("run", "--control", str(r.control), *program.arguments, livekit=False)
    await second.until(lambda: second.log("ready"))
    third: Run = await run("run", "--control", str(r.control), *program.arguments, livekit=False)
    assert await third.exit() == 78
    assert "can't be used" in third.err.read_text()
    second.control = r.control
    assert (await status(second))["pid"] == second.pid
    second.kill()
    assert await second.exit() == 0


async def test_watch_follows_and_ends_with_the_supervisor(run: StartRun, program: Program) -> None:
    """One document after the other, until there is no supervisor any more."""
    r: Run = await run("run", *program.arguments, livekit=False)
    await r.until(lambda: r.log("ready"))
    command = [*LASTCALL, "status", "--watch", "--json", "--control", str(r.control)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        lines = [await asyncio.to_thread(watching.stdout.readline) for _ in range(2)]
        assert all(json.loads(line)["pid"] == r.pid for line in lines)
        r.kill()
        assert await r.exit() == 0
        assert await asyncio.to_thread(watching.wait, 10) == 0


async def test_watch_on_a_terminal(run: StartRun, program: Program, terminal: Terminal) -> None:
    """A table until Ctrl-C, one of them, and the terminal is as it was."""
    r: Run = await run("run", *program.arguments, livekit=False)
    await r.until(lambda: r.log("ready"))
    before = terminal.attributes
    command = ("status", "--watch", "--control", str(r.control))
    watching: Run = await run(*command, livekit=False, terminal=terminal, environment={"TERM": "xterm"})
    await watching.until(lambda: b"running" in terminal.read())
    terminal.type(b"\x03")
    assert await watching.exit() == 0
    shown = terminal.read()
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l"), "the cursor is shown again"
    assert terminal.attributes == before
    assert lives(r.pid)


async def test_control_path_that_is_a_file(run: StartRun, program: Program) -> None:
    """A typo must not cost a file: exit 78, and it is still there."""
    precious = program.directory / "agent.py"
    precious.write_text("precious\n")
    r: Run = await run("run", "--control", str(precious), *program.arguments, livekit=False)
    assert await r.exit() == 78
    assert "exists and is no socket" in r.err.read_text()
    assert precious.read_text() == "precious\n"


async def test_file_in_the_place_of_the_socket(run: StartRun, program: Program) -> None:
    """The supervisor does not remove a file that has taken the place of its socket."""
    r: Run = await run("run", *program.arguments, livekit=False)
    await r.until(lambda: r.log("ready"))
    r.control.unlink()
    r.control.write_text("precious\n")
    r.kill()
    assert await r.exit() == 0
    assert r.control.read_text() == "precious\n"


async def test_other_users_are_refused(run: StartRun, program: Program) -> None:
    """The mode keeps them out; where it was loosened, their credentials do."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    r: Run = await run("run", *program.arguments, livekit=False)
    await r.until(lambda: r.log("ready"))
    r.control.chmod(0o666)
    r.control.parent.chmod(0o711)
    command = [sys.executable, "-c", STRANGER, r.control.name]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=r.control.parent, capture_output=True, text=True, check=False
    )
    assert done.stdout == "connected\nno answer\n", done
    assert r.process.poll() is None and not r.log("stop fencing")
    r.kill()
    assert await r.exit() == 0


def test_verb_imports_what_it_needs() -> None:
    """A verb that asks a supervisor loads neither an event loop nor the options of `run`."""
    asked = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lastcall", "status", "--control", "/nowhere"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert asked.returncode == 69
    lines = [line for line in asked.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip() for line in lines}
    assert "lastcall.supervisor.cli.operate" in loaded
    others = {"asyncio", "uvloop", "ssl", "aiohttp", "psutil", "livekit", "prometheus_client"}
    assert not loaded & (
        others | {"typer", "pydantic", "rich", "structlog", "lastcall.supervisor.config.options"}
    )
