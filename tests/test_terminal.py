"""A terminal: Ctrl-C up to three times, the background, and a terminal that is closed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from lastcall.supervisor.signal_actions import CtrlC, decide
from tests.support.harness import AGENT, Run, StartRun
from tests.support.program import status
from tests.support.terminal import Terminal


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_ctrl_c(run: StartRun, terminal: Terminal, times: int) -> None:
    """Once drains. Twice asks the jobs to shut down now, and a third time kills.

    Two within 0.3 s are one: terminals and wrappers send duplicates.
    """
    r: Run = await run("run", "--grace", "60", AGENT, terminal=terminal)
    await r.ready()
    job = await r.dispatch(sleep=3 if times == 1 else 60, mode="sleep" if times < 3 else "swallow")
    await r.job_says(job.job_id, "started")
    began = time.monotonic()
    for n in range(times):
        terminal.type(b"\x03")
        if n + 1 < times:
            await r.until(lambda: b"stopping (SIGINT)" in terminal.read())
            await asyncio.sleep(0.5)
    if times == 1:
        await asyncio.sleep(0.1)
        os.kill(r.pid, signal.SIGINT)
    code = await r.exit(60)
    took = time.monotonic() - began
    receipt = r.receipt()
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
        assert took < 12, "the callbacks of a call run 15 s after the second"
    await r.nothing_left()


async def test_closed_terminal(run: StartRun, terminal: Terminal) -> None:
    """The window is closed in the middle of a call: SIGHUP drains, and output to nowhere harms nobody."""
    r: Run = await run("run", "--grace", "30", AGENT, terminal=terminal)
    await r.ready()
    job = await r.dispatch(sleep=3)
    await r.job_says(job.job_id, "started")
    terminal.read()
    terminal.hang_up()
    assert await r.exit() == 0
    assert r.livekit.jobs[job.job_id].status == "JS_SUCCESS"
    assert "SIGHUP" in r.receipt()["reason"]
    await r.nothing_left()


CHATTY = ["--", "sh", "-c", "trap 'exit 0' TERM; while :; do echo line; sleep 0.1; done"]


async def test_in_the_background_with_tostop(run: StartRun) -> None:
    """Log lines arrive, no worker goes, and nothing spins; workers have the default dispositions."""
    terminal = Terminal(in_background=True)
    try:
        r: Run = await run("run", "-w", "2", *CHATTY, terminal=terminal, livekit=False)
        await r.until(lambda: terminal.read().count(b"slot ready") == 2, 40)
        (supervisor,) = psutil.Process(r.pid).children()
        assert os.getpgid(supervisor.pid) != os.tcgetpgrp(terminal.master), "it is in the background"
        began, used, shown = time.monotonic(), cpu_seconds(supervisor), terminal.read().count(b"line")
        await r.until(lambda: terminal.read().count(b"line") >= shown + 60, 40)
        share = (cpu_seconds(supervisor) - used) / (time.monotonic() - began)
        assert share < 0.05, f"{share:.0%} of a processor"
        for number in (signal.SIGTTOU, signal.SIGTTIN):
            os.kill(supervisor.pid, number)
        document = await status(r)
        assert [slot["state"] for slot in document["slots"]] == ["ready", "ready"]
        assert b"scale" not in terminal.read()
        for slot in document["slots"]:
            assert not ignored_by(slot["pid"]) & {signal.SIGTTIN, signal.SIGTTOU, signal.SIGPIPE}
        supervisor.terminate()
        assert await r.exit() == 0, terminal.text
        assert b"receipt" in terminal.read()
        await r.nothing_left()
    finally:
        terminal.hang_up()


def cpu_seconds(process: psutil.Process) -> float:
    """Return the processor time that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def ignored_by(pid: int) -> set[signal.Signals]:
    """Return the signals that a process ignores."""
    (mask,) = (
        int(line.split()[1], 16)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("SigIgn")
    )
    return {number for number in signal.Signals if mask >> (number - 1) & 1}


@pytest.mark.parametrize(
    ("count", "since", "has_terminal", "has_patience", "expected"),
    [
        (0, None, True, True, CtrlC.STOP),
        (0, None, True, False, CtrlC.STOP),
        (0, None, False, True, CtrlC.STOP),
        # Without a terminal a repeat is a stop again, which changes nothing.
        (1, 0.1, False, True, CtrlC.STOP),
        (1, 5.0, False, True, CtrlC.STOP),
        (7, 5.0, False, False, CtrlC.STOP),
        # On a terminal two close together are one, whichever it was.
        (1, 0.0, True, True, CtrlC.DUPLICATE),
        (1, 0.29, True, True, CtrlC.DUPLICATE),
        (2, 0.29, True, True, CtrlC.DUPLICATE),
        (1, 0.29, True, False, CtrlC.DUPLICATE),
        (1, 0.3, True, True, CtrlC.HURRY),
        (1, 3600.0, True, True, CtrlC.HURRY),
        (2, 0.3, True, True, CtrlC.KILL),
        (9, 0.3, True, True, CtrlC.KILL),
        (1, 0.3, True, False, CtrlC.KILL),
        (2, 0.3, True, False, CtrlC.KILL),
    ],
)
def test_what_a_ctrl_c_asks_for(
    count: int, since: float | None, has_terminal: bool, has_patience: bool, expected: CtrlC
) -> None:
    """The count before, the time since the last one, the terminal and `has_patience` decide the meaning."""
    assert decide(count, since, has_terminal=has_terminal, has_patience=has_patience) is expected


async def test_kill_in_the_same_turn_as_the_stop(run: StartRun) -> None:
    """SIGTERM and SIGQUIT read one after the other: the kill finds the stop that it hastens."""
    r: Run = await run("run", "--grace", "60", AGENT)
    await r.ready()
    job = await r.dispatch(sleep=60)
    await r.job_says(job.job_id, "started")
    os.kill(r.pid, signal.SIGSTOP)  # both signals are pending when the supervisor runs again
    r.kill()
    os.kill(r.pid, signal.SIGQUIT)
    began = time.monotonic()
    os.kill(r.pid, signal.SIGCONT)
    assert await r.exit() == 75
    assert time.monotonic() - began < 15, "grace is 60 s"
    assert r.receipt()["reason"] in ("SIGTERM", "SIGQUIT")
    assert r.fates() == {job.job_id: "cut"}
    await r.nothing_left()
