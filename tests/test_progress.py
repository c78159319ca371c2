"""Long work says what it waits for, and for how long yet."""

from __future__ import annotations

import io
import os
import re
import termios
import time
from types import SimpleNamespace

import pytest

from lastcall.supervisor.cli import progress as module
from lastcall.supervisor.cli.progress import CLEAR_LINE, SAY_AGAIN_EVERY, Progress
from tests.support.harness import SAMPLE, StartRun
from tests.support.terminal import Terminal


class Clock:
    """The time that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


def test_plain_lines_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that lasts gets a line, and another. A short one has none, and `--json` none at all."""
    clock = Clock(monkeypatch)
    said, quiet = io.StringIO(), io.StringIO()
    with Progress(said) as progress, Progress(quiet, is_quiet=True) as silent:
        for what, until in (("waits for a", 105.0), ("waits for b", 130.0)):
            due = clock.now + 60
            while clock.now < until:
                for each in (progress, silent):
                    each(what, due)
                clock.now += 0.5
    assert SAY_AGAIN_EVERY == 10.0
    assert said.getvalue() == "waits for b, 50 s yet at most\nwaits for b, 40 s yet at most\n"
    assert quiet.getvalue() == ""


def test_a_line_that_is_rewritten_on_a_terminal(monkeypatch: pytest.MonkeyPatch, terminal: Terminal) -> None:
    """Once a second, no wider than the terminal, and gone at the end, also for `--json`."""
    monkeypatch.setenv("TERM", "xterm")
    clock = Clock(monkeypatch)
    termios.tcsetwinsize(terminal.slave, (24, 20))
    with open(terminal.slave, "w", closefd=False) as stream, Progress(stream, is_quiet=True) as progress:
        for _ in range(4):
            progress("waits for it", 102.0)
            clock.now += 0.5
    os.write(terminal.slave, b"end")
    deadline = time.perf_counter() + 10
    while not terminal.read().endswith(b"end") and time.perf_counter() < deadline:
        pass  # the kernel passes on later what was written
    parts = terminal.read().decode().split(CLEAR_LINE)
    assert parts == ["", "waits for it, 2 s y", "waits for it, 1 s y", "waits for it, 0 s y", "end"]


class Gone(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, _text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work goes on without words."""
    clock = Clock(monkeypatch)
    progress = Progress(Gone())
    for _ in range(3):
        progress("waits for it", 200.0)
        clock.now += 11


async def test_doctor_on_a_terminal(run: StartRun, terminal: Terminal) -> None:
    """It says that it waits for the agent; the line is gone when the findings come."""
    r = await run("doctor", SAMPLE, terminal=terminal, livekit=False, environment={"TERM": "xterm"})
    assert await r.exit(90) in (0, 1)
    shown = terminal.read().decode()
    waits = re.findall(r"waits for [a-z -]+(?=, \d+ s yet at most)", shown, re.IGNORECASE)
    assert {"waits for the agent to register", "waits for the end of the stop"} <= set(waits)
    last = shown.rindex("s yet at most")
    assert CLEAR_LINE in shown[last:] and "ok" in shown[last:]
