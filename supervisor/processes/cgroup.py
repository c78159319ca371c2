"""The kernel's counters of the supervisor's control group: whether a process in it was killed for memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def oom_kills() -> int | None:
    """Return how many processes of the group were killed for memory so far; None without such a counter.

    Inside a container the group's own files are at the root of the mount.
    """
    for file in _files():
        try:
            text = file.read_text()
        except OSError:
            continue
        for line in text.splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


def oom_kills_since(before: int | None) -> int:
    """Return how many were killed since `oom_kills` has returned `before`; 0 where nobody knows."""
    kills = oom_kills()
    return 0 if kills is None or before is None else kills - before


def _files() -> Iterator[Path]:
    """Yield the files that may have the counter: cgroups(7), and cgroup-v1/memory of Linux since 4.13."""
    own: dict[str, str] = {}
    for line in _groups().splitlines():
        # `0::/path` of cgroup v2, `4:memory:/path` of cgroup v1
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path.lstrip("/"))
    for controller, file in (("", "memory.events"), ("memory", "memory.oom_control")):
        for path in (own.get(controller, ""), ""):
            yield ROOT / controller / path / file


def _groups() -> str:
    try:
        return Path("/proc/self/cgroup").read_text()
    except OSError:
        return ""
