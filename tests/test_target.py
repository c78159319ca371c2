"""A target under lastcall is the program that it is under `python agent.py start`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.harness import Run, StartRun

AGENT = """
from livekit.agents import JobContext, WorkerOptions, cli

async def entrypoint(ctx: JobContext):
    ctx.shutdown()

if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint, num_idle_processes=1))
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


async def job_runs(r: Run) -> None:
    """Wait for the worker, see one job to its end, and stop."""
    await r.ready()
    job = await r.dispatch()
    await r.until(lambda: r.livekit.jobs[job.job_id].status == "JS_SUCCESS", 20)
    r.kill()
    assert await r.exit() == 0
    await r.nothing_left()


async def refused(r: Run, expected: str) -> None:
    """Wait for exit 78, with one line that says why."""
    assert await r.exit(30) == 78
    said = [line for line in r.err.read_text().splitlines() if line.startswith("lastcall: ")]
    assert len(said) == 1, r.logs()
    assert expected in said[0]
    assert "Traceback" not in r.logs()
    await r.nothing_left()


SETTINGS = """
import os

class Settings:
    port: int = 8000

for name, kind in Settings.__annotations__.items():
    setattr(Settings, name, kind(os.environ.get(name.upper(), getattr(Settings, name))))
if __name__ == "__main__":
    assert __spec__ is None and __loader__.get_source(__name__).startswith(chr(10) + "import os")
"""


async def test_annotations_at_import(run: StartRun, tmp_path: Path) -> None:
    """Annotations hold classes: the file is not compiled with __future__ imports of lastcall."""
    write(tmp_path / "agent.py", SETTINGS + AGENT)
    await job_runs(await run("run", "--grace", "30", "agent.py", cwd=tmp_path))


@pytest.mark.parametrize("link", ["bin/agent.py", "current/agent.py"])
async def test_symlinked_target(run: StartRun, tmp_path: Path, link: str) -> None:
    """A link to the file, or to its directory: the modules beside the file itself are imported."""
    write(tmp_path / "app/helper.py", "N = 1\n")
    write(tmp_path / "app/agent.py", f"import helper\n{AGENT}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/agent.py").symlink_to("../app/agent.py")
    (tmp_path / "current").symlink_to("app")
    await job_runs(await run("run", "--grace", "30", link, cwd=tmp_path))
