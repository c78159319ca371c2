"""What of the outside a supervisor is given, so that tests, demo and dev can give it something else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lastcall.supervisor.processes.output_writer import Sink
from lastcall.worker.base import variables
from lastcall.worker.base.settings import WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """See the module. `spared_pids` are processes of ours that no sweep may touch."""

    environment: Mapping[str, str]
    has_terminal: bool
    stdout: Sink
    stderr: Sink
    # Demo, dev and rehearsal: what no option sets of the workers. Demo: no lines of the workers, no receipt.
    worker_settings: WorkerSettings
    spared_pids: frozenset[int] = frozenset()
    quiet_workers: bool = False
    quiet_receipt: bool = False
    # Lines of each worker begin with its slot. Without patience a second Ctrl-C kills.
    prefixes_lines: bool = False
    has_patience: bool = True


def surroundings(**more: Any) -> Surroundings:
    """Return the real surroundings of this process."""
    rehearsed = os.environ.get(variables.REHEARSAL)
    values: dict[str, Any] = {
        "environment": dict(os.environ),
        "has_terminal": _has_terminal(),
        "stdout": Sink(1),
        "stderr": Sink(2),
        "worker_settings": WorkerSettings() if not rehearsed else WorkerSettings.from_json(rehearsed),
    }
    return Surroundings(**(values | more))


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
