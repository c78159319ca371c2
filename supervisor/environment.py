"""The outside of a supervisor, as values, so that tests, demo and dev can give it another one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lastcall.supervisor.processes.output_writer import OutputWriter
from lastcall.supervisor.signals import has_terminal
from lastcall.worker.base import variables
from lastcall.worker.base.records import dataclass
from lastcall.worker.base.settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Environment variables, terminal and output of one supervisor, and what demo, dev and rehearse change.

    `worker_settings` are added to those of each worker. No sweep touches `spared_pids`, children that are no
    workers. `prefixes_lines` puts the slot in front of each line of a worker. Without `has_patience` a second
    Ctrl-C kills.
    """

    environment: Mapping[str, str]
    has_terminal: bool
    stdout: OutputWriter
    stderr: OutputWriter
    worker_settings: WorkerSettings
    spared_pids: frozenset[int] = frozenset()
    quiet_workers: bool = False
    quiet_receipt: bool = False
    prefixes_lines: bool = False
    has_patience: bool = True


def surroundings(**more: Any) -> Surroundings:
    """Return the real surroundings of this process."""
    rehearsed = os.environ.get(variables.REHEARSAL)
    values: dict[str, Any] = {
        "environment": dict(os.environ),
        "has_terminal": has_terminal(),
        "stdout": OutputWriter(1),
        "stderr": OutputWriter(2),
        # A rehearsal sets the variable for the supervisor that it starts.
        "worker_settings": WorkerSettings() if not rehearsed else WorkerSettings.from_json(rehearsed),
    }
    return Surroundings(**(values | more))
