"""`lastcall dev` on a terminal: a change is a reload, a running call finishes on the old code."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from lastcall.supervisor.cli.dev import remote_host
from lastcall.supervisor.cli.source_changes import ignored_by_git, is_source
from tests.support.harness import Run, StartRun
from tests.support.terminal import Terminal

AGENT_TEXT = """
import asyncio, os, sys
from livekit.agents import JobContext, WorkerOptions, cli

VERSION = 1

async def entrypoint(ctx: JobContext) -> None:
    print("call", VERSION, "begins", flush=True)
    while not os.path.exists("go"):
        await asyncio.sleep(0.02)
    print("call", VERSION, "ends", flush=True)
    ctx.shutdown()

if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint, load_threshold=float("inf"), num_idle_processes=1))
"""


async def start(run: StartRun, terminal: Terminal, directory: Path, *arguments: str) -> Run:
    control = str(directory / "c.sock")
    r: Run = await run(
        "dev", "--control", control, *arguments, terminal=terminal, livekit=False, cwd=directory
    )
    return r


async def test_a_change_is_a_reload(run: StartRun, terminal: Terminal, tmp_path: Path) -> None:
    """Edited while a call runs: the next call is on the new code, the first one ends on the old."""
    agent = tmp_path / "agent.py"
    agent.write_text(AGENT_TEXT)
    r = await start(run, terminal, tmp_path, "--grace", "30", "agent.py")
    before = terminal.attributes
    await r.until(lambda: b"call 1 begins" in terminal.read(), 40)
    assert b"local dispatch server" in terminal.text
    agent.write_text(AGENT_TEXT.replace("VERSION = 1", "VERSION = 2"))
    await r.until(lambda: b"call 2 begins" in terminal.read(), 40)
    assert b"call 1 ends" not in terminal.text
    assert b"0.2 |" in terminal.text, "a worker's lines carry slot and generation"
    agent.write_text("def broken(:\n")
    await r.until(lambda: b"reload failed" in terminal.read(), 40)
    assert b"SyntaxError" in terminal.text
    (tmp_path / "go").touch()
    await r.until(lambda: b"call 1 ends" in terminal.read() and b"call 2 ends" in terminal.read(), 20)
    terminal.type(b"\x03")
    assert await r.exit() == 0, terminal.text
    assert terminal.attributes == before
    await r.nothing_left()


async def test_ctrl_c_twice_ends_at_once(run: StartRun, terminal: Terminal, tmp_path: Path) -> None:
    """The second Ctrl-C kills, because a developer does not wait."""
    (tmp_path / "agent.py").write_text(AGENT_TEXT)
    r = await start(run, terminal, tmp_path, "--grace", "600", "agent.py")
    await r.until(lambda: b"call 1 begins" in terminal.read(), 40)
    terminal.type(b"\x03")
    await r.until(lambda: b"stop draining" in terminal.read())
    await asyncio.sleep(0.4)  # two within 0.3 s are one
    terminal.type(b"\x03")
    assert await r.exit(10) == 75
    await r.nothing_left()


def test_what_git_ignores(tmp_path: Path) -> None:
    """Files of .gitignore are no reason for a reload; without a repository none is ignored."""
    assert ignored_by_git(tmp_path, {"a.log", "a.py"}) == set()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("*.log\n")
    assert ignored_by_git(tmp_path, {"a.log", "a.py"}) == {"a.log"}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("agent.py", True),
        ("prompts/greeting.md", True),
        (".env", True),
        ("calls.log", False),
        ("a.wav", False),
    ],
)
def test_what_is_a_source(name: str, source: bool) -> None:
    """A file that an agent writes is no reason to replace the agent."""
    assert is_source(Path(name)) is source


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("ws://localhost:7880", False),
        ("ws://127.0.0.1:7880", False),
        ("wss://calls.example.com", True),
    ],
)
def test_remote_project_is_pointed_out(url: str, warned: bool) -> None:
    """Real calls would come here."""
    assert bool(remote_host(url)) is warned
