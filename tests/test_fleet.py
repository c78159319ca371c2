"""Operating a running supervisor, where livekit adds nothing: opaque workers, the socket, the verbs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.support.harness import LASTCALL, Run, StartRun
from tests.support.program import Program, status, status_when, ups, verb


async def test_reload_starts_the_new_before_it_stops_the_old(run: StartRun, program: Program) -> None:
    """One after the other, each old one told to stop only when its successor has stayed up."""
    r: Run = await run("run", "-w", "3", *program.arguments, livekit=False)
    await r.until(lambda: ups(r, "1") == 3)
    program.write("2")
    said = await verb(r, "reload", "--wait")
    assert "3 of 3 done" in said
    await r.until(lambda: r.out.read_text().count("down 1 ") == 3)
    assert ups(r, "2") == 3
    starts = [e for e in r.log("slot starting") if e["generation"] == 2]
    readies = [e for e in r.log("slot ready") if e["generation"] == 2]
    drains = r.log("slot draining")
    for n in range(3):
        assert readies[n]["timestamp"] < drains[n]["timestamp"]
        assert n == 0 or drains[n - 1]["timestamp"] <= starts[n]["timestamp"], "two were started at a time"
    second = [(n, 2, "ready") for n in range(3)]
    await status_when(r, lambda d: [(s["slot"], s["generation"], s["state"]) for s in d["slots"]] == second)
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


async def test_surge_bounds_how_many_start_at_a_time(run: StartRun, program: Program) -> None:
    """max_surge = 2: the first slot alone, then two at a time."""
    program.configure("max_surge = 2\n")
    r: Run = await run("run", "-w", "5", *program.arguments, livekit=False)
    await r.until(lambda: ups(r, "1") == 5)
    os.kill(r.pid, signal.SIGHUP)
    await r.until(lambda: r.log("reload done"))
    alive = most = 0
    for line in r.err.read_text().splitlines():
        entry = json.loads(line)
        if entry.get("generation") == 2 and entry["event"] == "slot starting":
            alive += 1
        elif entry.get("generation") == 1 and entry["event"] == "slot draining":
            alive -= 1
        most = max(most, alive)
    assert most == 2
    r.kill()
    assert await r.exit() == 0


@pytest.mark.parametrize("how", ["broken", "missing"])
async def test_broken_new_version(run: StartRun, program: Program, how: str) -> None:
    """The old one keeps serving; the reason is in status, log and the exit code of the verb."""
    # On a busy machine it takes seconds until the broken program has read that it is to fail.
    program.config.write_text("[reload]\nsettle = 5\n")
    r: Run = await run("run", "-w", "2", *program.arguments, livekit=False)
    await r.until(lambda: ups(r, "1") == 2)
    if how == "broken":
        program.write("broken")
    else:
        program.config.write_text('command = ["no-such-program"]\n')
    before = {s["pid"] for s in (await status(r))["slots"]}
    if how == "missing":  # the command line would win over the file, so the program itself goes
        (program.directory / "program.py").unlink()
    said = await verb(r, "reload", "--wait", code=1)
    assert "reload failed: the old program keeps serving" in said
    document = await status_when(r, lambda d: {s["pid"] for s in d["slots"]} == before)
    assert document["operations"][-1]["state"] == "failed"
    assert r.log("reload failed")
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


async def test_wrong_configuration_at_a_reload(run: StartRun, program: Program) -> None:
    """One line that names the value; nothing is started."""
    r: Run = await run("run", *program.arguments, livekit=False)
    await r.until(lambda: ups(r, "1") == 1)
    program.config.write_text('grace = "soon"\n')
    said = await verb(r, "reload", "--wait", code=1)
    assert "grace: got 'soon', expected a valid number" in said
    assert len(r.log("slot starting")) == 1
    r.kill()
    assert await r.exit() == 0


async def test_configuration_is_read_again(run: StartRun, program: Program) -> None:
    """A new size takes effect with the reload; what needs a restart is said."""
    r: Run = await run("run", *program.arguments, livekit=False)
    await r.until(lambda: ups(r, "1") == 1)
    program.config.write_text('workers = 3\nlog_format = "console"\n[reload]\nsettle = 0.1\n')
    await verb(r, "reload", "--wait")
    await r.until(lambda: ups(r, "1") == 4)
    assert [e["key"] for e in r.log("takes effect at the next restart")] == ["log_format"]
    assert (await status(r))["workers"] == 3
    r.kill()
    assert await r.exit() == 0


async def test_reload_while_the_old_still_drain(run: StartRun, program: Program) -> None:
    """Three generations of one slot run at a time. Each ends when its jobs have, and a stop waits for all."""
    r: Run = await run("run", *program.arguments, livekit=False)
    await r.until(lambda: ups(r, "1") == 1)
    (program.directory / "busy").touch()
    for version in ("2", "3"):
        program.write(version)
        await verb(r, "reload", "--wait")
        # The reload does not wait until the program has read its version.
        await r.until(lambda version=version: ups(r, version) == 1)  # type: ignore[misc]
    document = await status(r)
    assert [(s["generation"], s["state"]) for s in document["slots"]] == [
        (1, "draining"),
        (2, "draining"),
        (3, "ready"),
    ]
    r.kill()
    await r.until(lambda: r.log("stop draining"))
    (program.directory / "busy").unlink()
    assert await r.exit() == 0
    assert r.out.read_text().count("down ") == 3
    await r.nothing_left()


async def test_reload_during_a_reload(run: StartRun, program: Program) -> None:
    """The second reads everything afresh once the first is through; more than two are one."""
    r: Run = await run("run", "-w", "2", *program.arguments, livekit=False)
    await r.until(lambda: ups(r, "1") == 2)
    for _ in range(5):
        os.kill(r.pid, signal.SIGHUP)
        await asyncio.sleep(0.02)
    await r.until(lambda: len(r.log("reload done")) == 2)
    assert len(r.log("slot starting")) == 2 + 4
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


async def test_stop_during_a_reload(run: StartRun, program: Program) -> None:
    """The new one is taken along, whether or not it had become ready."""
    program.config.write_text("[reload]\nsettle = 30\n")
    r: Run = await run("run", "-w", "2", *program.arguments, livekit=False)
    await r.until(lambda: ups(r, "1") == 2)
    await verb(r, "reload")
    await r.until(lambda: len(r.log("slot starting")) == 3)
    r.kill()
    assert await r.exit() == 0
    refused = r.log("reload failed")
    assert refused and "being stopped" in refused[0]["reason"]
    await r.nothing_left()


async def test_reload_during_a_stop(run: StartRun, program: Program) -> None:
    """Is refused, in one line."""
    r: Run = await run("run", *program.arguments, livekit=False)
    await r.until(lambda: ups(r, "1") == 1)
    (program.directory / "busy").touch()
    r.kill()
    await r.until(lambda: r.log("stop draining"))
    assert "stopping" in await verb(r, "reload", "--wait", code=1)
    (program.directory / "busy").unlink()
    assert await r.exit() == 0


async def test_scale_up_and_down(run: StartRun, program: Program) -> None:
    """By the verb and by signals; the youngest goes first, and drains."""
    r: Run = await run("run", *program.arguments, livekit=False)
    await r.until(lambda: ups(r, "1") == 1)
    await verb(r, "scale", "3", "--wait")
    await r.until(lambda: ups(r, "1") == 3)
    assert [s["slot"] for s in (await status(r))["slots"]] == [0, 1, 2]
    os.kill(r.pid, signal.SIGTTOU)
    await r.until(lambda: r.out.read_text().count("down ") == 1)
    await r.until(lambda: len(r.log("scale done")) == 2)
    await status_when(r, lambda d: [s["slot"] for s in d["slots"]] == [0, 1])
    os.kill(r.pid, signal.SIGTTIN)
    await r.until(lambda: ups(r, "1") == 4)
    assert "0 workers; expected 1 to 1000" in await verb(r, "scale", "0", code=1)
    await verb(r, "scale", "1", "--wait")
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


async def test_recycle(run: StartRun, program: Program) -> None:
    """One slot, by number; a number that is none is refused with those that are."""
    r: Run = await run("run", "-w", "2", *program.arguments, livekit=False)
    await r.until(lambda: ups(r, "1") == 2)
    await verb(r, "recycle", "1", "--wait")
    await r.until(lambda: r.out.read_text().count("down ") == 1)
    await status_when(r, lambda d: [(s["slot"], s["generation"]) for s in d["slots"]] == [(0, 1), (1, 2)])
    assert "there is no slot 7; expected one of 0, 1" in await verb(r, "recycle", "7", code=1)
    r.kill()
    assert await r.exit() == 0


async def test_drain_verb(run: StartRun, program: Program) -> None:
    """Is the stop."""
    r: Run = await run("run", *program.arguments, livekit=False)
    await r.until(lambda: ups(r, "1") == 1)
    assert "stopped" in await verb(r, "drain", "--wait")
    assert await r.exit() == 0
    assert r.receipt()["reason"] == "drain was asked for"


async def test_verbs_without_a_supervisor(tmp_path: Path) -> None:
    """One line with the socket's path, exit code 69."""
    path = tmp_path / "none.sock"
    for arguments in (["status"], ["reload"], ["drain"], ["hold"], ["release"], ["dump"], ["scale", "2"]):
        command = [*LASTCALL, *arguments, "--control", str(path)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
        assert done.returncode == 69
        assert done.stderr.count("\n") == 1 and str(path) in done.stderr


async def test_many_reloads_leave_nothing_behind(run: StartRun, program: Program) -> None:
    """Fifty in a row: as many processes and descriptors as before."""
    program.config.write_text("[reload]\nsettle = 0\n")
    r: Run = await run("run", "-w", "2", *program.arguments, livekit=False)
    await r.until(lambda: ups(r, "1") == 2)
    supervisor = psutil.Process(r.pid)

    async def settled() -> tuple[int, int]:
        await r.until(lambda: len(supervisor.children()) == 2)
        return len(supervisor.children()), supervisor.num_fds()

    await verb(r, "reload", "--wait")
    await r.until(lambda: r.out.read_text().count("down ") == 2)
    before = await settled()
    for n in range(50):
        os.kill(r.pid, signal.SIGHUP)
        await r.until(lambda n=n: len(r.log("reload done")) == n + 2)  # type: ignore[misc]  # bound early
    assert await settled() == before
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


# -- pure --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({}, ""),
        ({"max_age": 100}, ""),
        ({"max_age": 50}, "older than 50 s"),
        ({"max_jobs": 8}, ""),
        ({"max_jobs": 7}, "7 jobs"),
        ({"max_rss_mb": 201}, ""),
        ({"max_rss_mb": 200}, "200 MB"),
    ],
)
def test_why_recycle(limits: dict[str, int], reason: str) -> None:
    """A worker of 60 s, 7 jobs and 200 private MB is due by each limit that it has reached, by no other."""
    from lastcall.supervisor.config import Recycle
    from lastcall.supervisor.fleet.stalls import why_recycle
    from lastcall.supervisor.fleet.states import SlotState
    from lastcall.supervisor.fleet.worker_view import LastBeat
    from lastcall.worker.base.clock import now
    from tests.support.generations import generation_in

    generation, _log = generation_in(SlotState.READY)
    generation.ready_at = now() - 60
    generation.reports.jobs_started = 7
    generation.reports.beat = LastBeat(at=now(), rss_bytes=900_000_000)  # which has the image's pages
    generation.private_bytes = 200_000_000
    why = why_recycle(Recycle(**limits), generation)
    assert reason in why if reason else why == ""
