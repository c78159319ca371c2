"""The kernel's counters of the supervisor's control group: whether a process in it was killed for memory."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def oom_kills() -> int | None:
    """Return how many processes of the group were killed for memory so far; None without such a counter.

    Only of cgroup v2; inside a container the group's own files are at the root of the mount.
    """
    for directory in (_own(), ROOT):
        try:
            text = (directory / "memory.events").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


def _own() -> Path:
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return ROOT / line.removeprefix("0::").lstrip("/")
    except OSError:
        pass
    return ROOT
