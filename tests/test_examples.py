"""The examples are what they say; other tests run them, as test_goodbye and test_systemd do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.harness import LASTCALL

EXAMPLES = Path(__file__).parent.parent / "examples"
DEPLOY = EXAMPLES.parent / "scripts" / "deploy"


def test_the_projects_have_the_agent_of_the_tutorial() -> None:
    """An agent that runs in one of them runs in the others."""
    agents = {name: (EXAMPLES / name / "agent.py").read_text() for name in ("ci", "docker", "systemd")}
    assert set(agents.values()) == {(EXAMPLES / "first" / "agent.py").read_text()}


@pytest.mark.parametrize(("kind", "file"), [("docker", "Dockerfile"), ("compose", "compose.yaml")])
def test_the_docker_project_is_printed(kind: str, file: str) -> None:
    """Its files are those of `lastcall unit`, whose command is in the first line of each."""
    expected = (EXAMPLES / "docker" / file).read_text()
    words = expected.partition("\n")[0].removeprefix("# lastcall ").split()
    assert words[:2] == ["unit", kind]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LASTCALL_")}
    done = subprocess.run(
        [*LASTCALL, *words],
        cwd=EXAMPLES / "docker",
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == expected
    ignored = (EXAMPLES / "docker" / ".dockerignore").read_text()
    assert ignored == (DEPLOY / ".dockerignore").read_text()
