"""Ctrl-C on a terminal: once, twice, thrice; and a terminal that is closed."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from tests.support.harness import AGENT, Run, StartRun
from tests.support.terminal import Terminal


@pytest.mark.alone
@pytest.mark.parametrize("times", [1, 2, 3])
async def test_ctrl_c(run: StartRun, terminal: Terminal, times: int) -> None:
    """Once drains; twice asks the jobs to shut down now; a third time kills."""
    r: Run = await run("run", "--grace", "60", AGENT, terminal=terminal)
    await r.ready()
    job = await r.dispatch(sleep=3 if times == 1 else 60, mode="sleep" if times < 3 else "swallow")
    await r.job_says(job.job_id, "started")
    began = time.monotonic()
    for n in range(times):
        terminal.type(b"\x03")
        if n + 1 < times:
            await r.until(lambda: b"stop draining" in terminal.read())
            await asyncio.sleep(0.5)
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
        assert took < 5
    await r.nothing_left()


async def test_duplicate_ctrl_c_is_one(run: StartRun, terminal: Terminal) -> None:
    """Two within 0.3 s are one: terminals and wrappers send duplicates."""
    r: Run = await run("run", "--grace", "30", AGENT, terminal=terminal)
    await r.ready()
    job = await r.dispatch(sleep=2)
    await r.job_says(job.job_id, "started")
    os.kill(r.pid, signal.SIGINT)
    await asyncio.sleep(0.1)
    os.kill(r.pid, signal.SIGINT)
    assert await r.exit() == 0
    assert r.livekit.jobs[job.job_id].status == "JS_SUCCESS"


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
