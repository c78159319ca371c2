"""What of the outside a supervisor is given, so that tests, demo and dev can give it something else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lastcall.supervisor.processes.output_writer import OutputWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """See the module. `spared_pids` are processes of ours that no sweep may touch."""

    environment: Mapping[str, str]
    has_terminal: bool
    stdout: OutputWriter
    stderr: OutputWriter
    # Demo: more settings for the workers, processes of ours that no sweep may touch, and no workers' lines.
    worker_settings: Mapping[str, object]
    spared_pids: frozenset[int] = frozenset()
    quiet_workers: bool = False
    quiet_receipt: bool = False
    # Lines of each worker begin with its slot. Without patience a second Ctrl-C kills.
    prefixes_lines: bool = False
    has_patience: bool = True


def surroundings(**more: Any) -> Surroundings:
    """Return the real surroundings of this process."""
    values: dict[str, Any] = {
        "environment": dict(os.environ),
        "has_terminal": _has_terminal(),
        "stdout": OutputWriter(1),
        "stderr": OutputWriter(2),
        # Set by a rehearsal for the supervisor that it starts; nobody else's business.
        "worker_settings": json.loads(os.environ.get("LASTCALL_WORKER_REHEARSAL", "{}")),
    }
    return Surroundings(**(values | more))


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
