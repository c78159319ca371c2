"""Programs that stand for workers, and the verbs of the command line."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lastcall.supervisor.views import control_socket
from tests.support.harness import LASTCALL, Run

# A program that prints its version. On SIGTERM it ends well, once the file "busy" is gone.
PROGRAM = """
import os, pathlib, signal, sys, time
directory = pathlib.Path(sys.argv[1])
version = (directory / "version").read_text()
if version == "broken":
    sys.exit(3)
if version == "slow":
    time.sleep(600)
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
print("up", version, os.getpid(), flush=True)
while not stopping or (directory / "busy").exists():
    time.sleep(0.01)
print("down", version, os.getpid(), flush=True)
"""
# Works for a while after a SIGTERM, and prints how many SIGTERMs came.
POLITE = """
import signal, sys, time
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
print("up", flush=True)
while not seen:
    time.sleep(0.01)
time.sleep({after})
print("terms", len(seen), flush=True)
"""
# Ignores SIGTERM.
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('up', flush=True)
time.sleep(600)
"""


def polite(after: float = 0.0) -> list[str]:
    """Return a command line, from `--` on, of a program that ends so many seconds after a SIGTERM."""
    return ["--", sys.executable, "-c", POLITE.format(after=after)]


class Program:
    """A directory with a program whose version a test changes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "program.py").write_text(PROGRAM)
        self.config = directory / "lastcall.toml"
        self.configure()
        self.write("1")

    def configure(self, text: str = "") -> None:
        self.config.write_text("[reload]\nsettle = 0.3\n" + text)

    def write(self, version: str) -> None:
        (self.directory / "version").write_text(version)

    @property
    def arguments(self) -> list[str]:
        command = [sys.executable, str(self.directory / "program.py"), str(self.directory)]
        return ["--config", str(self.config), "--", *command]


async def verb(r: Run, *arguments: str, code: int = 0, timeout: float = 30.0) -> str:
    """Run a verb against the run's supervisor and return what it printed."""
    command = [*LASTCALL, *arguments, "--control", str(r.control)]

    def call() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    done = await asyncio.to_thread(call)
    assert done.returncode == code, (arguments, done, r.logs())
    return done.stdout + done.stderr


async def status(r: Run) -> dict[str, Any]:
    """Return what `lastcall status --json` prints, without the half a second in which that verb starts."""
    return await asyncio.to_thread(control_socket.ask, r.control, "status")


async def status_when(r: Run, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Return the status once it is so: a process has ended before the supervisor knows that it has."""
    deadline = time.monotonic() + 10
    while not holds(document := await status(r)):
        assert time.monotonic() < deadline, (document, r.logs())
        await asyncio.sleep(0.02)
    return document


def ups(r: Run, version: str) -> int:
    return r.out.read_text().count(f"up {version} ")
