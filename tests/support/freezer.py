"""Processes that SIGKILL can't end for a while, as one with much memory or in uninterruptible sleep.

Only the freezer of cgroup v1 holds a killed process back; a frozen one of cgroup v2 dies at once.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup/freezer")


class Freezer:
    """A cgroup whose processes are frozen until `thaw`, at the latest at the end of the test."""

    def __init__(self) -> None:
        self._group = ROOT / f"lastcall-test-{secrets.token_hex(4)}"

    @staticmethod
    def is_there() -> bool:
        return (ROOT / "cgroup.procs").exists() and os.access(ROOT, os.W_OK)

    def __enter__(self) -> Freezer:
        self._group.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()
        deadline = time.monotonic() + 5.0
        while True:
            try:
                self._group.rmdir()
                return
            except OSError:  # a process is still dying in it
                assert time.monotonic() < deadline, "still in use after 5 s"
                time.sleep(0.01)

    def freeze(self, pid: int) -> None:
        (self._group / "cgroup.procs").write_text(str(pid))
        self._set("FROZEN")

    def thaw(self) -> None:
        self._set("THAWED")

    def _set(self, state: str) -> None:
        (self._group / "freezer.state").write_text(state)
        deadline = time.monotonic() + 5.0
        while (self._group / "freezer.state").read_text().strip() != state:
            assert time.monotonic() < deadline, f"not {state} within 5 s"
            time.sleep(0.01)
