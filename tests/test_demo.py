"""`lastcall demo`, as a newcomer runs it: nothing configured, off a terminal and on one."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest

from tests.support.harness import SAMPLE, Run, StartRun
from tests.support.proxy import DEAD
from tests.support.terminal import Terminal

TERM = {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}


@pytest.mark.long
async def test_plain_lines(run: StartRun) -> None:
    """Off a terminal: a line now and then, a stop by itself, one line of receipt that adds up.

    No proxy can reach its servers, so none is asked.
    """
    r: Run = await run("demo", "--seconds", "10", livekit=False, environment=DEAD)
    assert await r.exit(90) == 0
    text = r.out.read_text()
    (receipt,) = re.findall(r"^receipt: .*$", text, re.MULTILINE)
    assert "clean, exit code 0" in receipt
    assert "processes left 0" in receipt
    (numbers,) = re.findall(r"(\d+) started, (\d+) finished, (\d+) failed, (\d+) cut, (\d+) lost", receipt)
    started, finished, *others = map(int, numbers)
    assert started == finished > 0
    assert others == [0, 0, 0]
    assert re.search(r"^ +\d+ s  running: slot 0 .*\bready \d+ jobs?\b", text, re.MULTILINE)
    assert "Traceback" not in r.logs()
    assert re.search(r"^  lastcall dev agent.py  ", text, re.MULTILINE)
    await r.nothing_left()


def test_the_load_of_the_machine_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent of the demo tells the server a load of 0. To a load of 1 the server would offer no job."""
    given: list[Any] = []
    monkeypatch.setattr("livekit.agents.cli.run_app", given.append)
    runpy.run_path(SAMPLE, run_name="__main__")
    (options,) = given
    assert options.load_fnc() == 0.0
    assert options.load_threshold == float("inf")


async def test_ctrl_c_on_a_terminal(run: StartRun, terminal: Terminal) -> None:
    """A live table until Ctrl-C, then the stop's phases and the receipt; the terminal is as it was."""
    before = terminal.attributes
    r: Run = await run("demo", terminal=terminal, livekit=False, environment=TERM)
    await r.until(lambda: re.search(rb"[1-9]\d* ended by themselves", terminal.read()), 60)
    terminal.type(b"\x03")
    assert await r.exit(45) == 0
    shown = terminal.read().decode()
    stop = shown[shown.index("stopping (SIGINT): no new job is accepted") :]
    assert stop.index("draining") < stop.index("0 left") < stop.index("lastcall rehearse agent.py")
    assert "Ctrl-C stops: no new call" in shown
    assert "Ctrl-C asks the calls that still run to end now" in stop
    assert "ended by themselves, 0 cut, 0 lost" in stop
    assert "exit code 0, " in stop, "the receipt begins with the outcome"
    assert terminal.attributes == before
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is shown again"
    await r.nothing_left()
