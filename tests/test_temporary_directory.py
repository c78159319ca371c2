"""How long the path of the temporary directory may be: sockets are made in it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.support.harness import AGENT, LASTCALL, Run, StartRun


def long_directory(parent: Path, length: int) -> Path:
    """Return a directory whose path has so many bytes."""
    made = parent / ("x" * (length - len(str(parent)) - 1))
    made.mkdir()
    return made


async def test_temporary_directory_as_long_as_can_be(run: StartRun) -> None:
    """Jobs run below the longest TMPDIR with which `python agent.py start` runs them."""
    with tempfile.TemporaryDirectory(prefix="lc-") as parent:
        # multiprocessing's own: /pymp-12345678/listener-12345678
        directory = long_directory(Path(parent), 107 - 32)
        r: Run = await run("run", "--grace", "30", AGENT, environment={"TMPDIR": str(directory)})
        await r.ready()
        job = await r.dispatch(sleep=0.1)
        await r.job_says(job.job_id, "ended")
        r.kill()
        assert await r.exit() == 0
        await r.clean(job)


@pytest.mark.parametrize("verb_name", ["run", "rehearse"])
async def test_temporary_directory_that_is_too_long(run: StartRun, verb_name: str) -> None:
    """One line with the variable, and exit 78: no socket of a worker would fit."""
    with tempfile.TemporaryDirectory(prefix="lc-") as parent:
        directory = long_directory(Path(parent), 107 - 31)
        command = [*LASTCALL, verb_name, AGENT] + (["--http", "off"] if verb_name == "run" else [])
        r: Run = await run(command=command, livekit=False, environment={"TEMP": str(directory), "TMPDIR": ""})
        assert await r.exit(30) == 78
        (said,) = [line for line in r.err.read_text().splitlines() if line.startswith("lastcall: ")]
        assert f"TEMP: {directory} has 76 bytes, expected 75 at most" in said
        assert "Traceback" not in r.logs()
