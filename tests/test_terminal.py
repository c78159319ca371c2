"""Ctrl-C on a terminal: once, twice, thrice; and a terminal that is closed."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harness import AGENT, LASTCALL, Run

# Gives a command the pty on its standard input as controlling terminal, as a shell would.
LEASH = (
    "import fcntl,os,sys,termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A pty whose foreground process group is a supervisor's; typing ^C signals the whole group."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        os.set_blocking(self.master, False)
        self.text = b""

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def read(self) -> bytes:
        try:
            while chunk := os.read(self.master, 65536):
                self.text += chunk
        except OSError:
            pass
        return self.text

    def close(self) -> None:
        os.close(self.master)


async def start(run: Any, tmp_path: Path, *arguments: str) -> tuple[Run, Terminal]:
    import subprocess

    terminal = Terminal()
    r: Run = await run(command=["true"])
    environment = {**os.environ, **r.livekit.environment, "JOB_LOG": str(r.job_log)}
    from tests.harness import TOKEN

    environment[TOKEN] = r.token
    options = ["run", "--http", "off", "--control", str(r.control), "--receipt", str(r.receipt_file)]
    r.process.wait()
    r.process = subprocess.Popen(
        [sys.executable, "-c", LEASH, *LASTCALL, *options, *arguments],
        env=environment,
        stdin=terminal.slave,
        stdout=terminal.slave,
        stderr=terminal.slave,
        start_new_session=True,
    )
    os.close(terminal.slave)
    return r, terminal


async def exit_of(r: Run, terminal: Terminal, timeout: float = 30.0) -> int:
    await r.until(lambda: (terminal.read(), r.process.poll() is not None)[1], timeout)
    assert r.process.returncode is not None
    return r.process.returncode


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_ctrl_c(run: Any, tmp_path: Path, times: int) -> None:
    """Once drains; twice asks the jobs to shut down now; a third time kills."""
    r, terminal = await start(run, tmp_path, "--grace", "60", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=3 if times == 1 else 60, mode="sleep" if times < 3 else "swallow")
    await r.job_says(job.job_id, "started")
    began = time.monotonic()
    for n in range(times):
        terminal.type(b"\x03")
        if n + 1 < times:
            await r.until(lambda: b"stop draining" in terminal.read())
            await asyncio.sleep(0.5)
    code = await exit_of(r, terminal, 60)
    took = time.monotonic() - began
    receipt = json.loads(r.receipt_file.read_text())
    assert receipt["reason"] == "SIGINT"
    if times == 1:
        assert (code, receipt["outcome"]) == (0, "clean"), terminal.text
        assert r.livekit.jobs[job.job_id].status == "JS_SUCCESS"
    elif times == 2:
        # livekit-agents gives the entrypoint 15 s before it cancels it and runs the callbacks.
        assert (code, receipt["outcome"]) == (75, "cut"), terminal.text
        assert took < 30
        assert any(note["what"] == "callback" for note in r.notes())
        assert r.livekit.jobs[job.job_id].ended_at is not None
    else:
        assert (code, receipt["outcome"]) == (75, "cut"), terminal.text
        assert took < 5
    await r.nothing_left()
    terminal.close()


async def test_duplicate_ctrl_c_is_one(run: Any, tmp_path: Path) -> None:
    """Two within 0.3 s are one: terminals and wrappers send duplicates."""
    r, terminal = await start(run, tmp_path, "--grace", "30", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=2)
    await r.job_says(job.job_id, "started")
    os.kill(r.pid, signal.SIGINT)
    await asyncio.sleep(0.1)
    os.kill(r.pid, signal.SIGINT)
    assert await exit_of(r, terminal) == 0
    assert r.livekit.jobs[job.job_id].status == "JS_SUCCESS"
    terminal.close()


async def test_closed_terminal(run: Any, tmp_path: Path) -> None:
    """The window is closed in the middle of a call: SIGHUP drains, and output to nowhere harms nobody."""
    r, terminal = await start(run, tmp_path, "--grace", "30", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=3)
    await r.job_says(job.job_id, "started")
    terminal.read()
    terminal.close()
    assert await r.exit() == 0
    assert r.livekit.jobs[job.job_id].status == "JS_SUCCESS"
    assert "SIGHUP" in json.loads(r.receipt_file.read_text())["reason"]
    await r.nothing_left()
