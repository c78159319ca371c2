"""The kernel's count of processes that were killed for memory, in both hierarchies of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from lastcall.supervisor.processes import cgroup


@pytest.mark.parametrize(
    "file",
    ["unit/memory.events", "memory.events", "memory/pod/memory.oom_control", "memory/memory.oom_control"],
)
def test_kills_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """The count is that of the supervisor's own group, or of the root that a container sees."""
    own = "9:name=systemd:/\n4:cpu,memory:/pod\n0::/unit\n"
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "_groups", lambda: own)
    assert cgroup.oom_kills() is None
    assert cgroup.oom_kills_since(None) == 0
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("under_oom 0\noom_kill 3\n")
    assert cgroup.oom_kills() == 3
    assert cgroup.oom_kills_since(1) == 2
