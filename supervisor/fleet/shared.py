"""The values that every generation of a supervisor reads and writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import field
from typing import Any

from lastcall.supervisor.config import Config
from lastcall.supervisor.fleet.histogram import Histogram
from lastcall.supervisor.processes.descendants import Swept
from lastcall.supervisor.receipt import Ledger, StopRecord
from lastcall.worker.base.records import dataclass


@dataclass(slots=True, kw_only=True)
class Shared:
    """Configuration, accounts and log. The fleet changes `config`, `is_stopping` and `is_held`, nobody else.

    `known_pids` are children that no sweep may touch. `on_change` wakes what waits for the fleet.
    """

    config: Config
    ledger: Ledger
    record: StopRecord
    log: Any
    known_pids: set[int]
    on_change: Callable[[], None]
    may_sweep_unmarked: Callable[[], bool]
    fence_seconds: Histogram
    drain_seconds: Histogram
    swept: Swept = field(default_factory=Swept)
    # Job processes that did not get ready, by slot.
    process_failures: Counter[int] = field(default_factory=Counter)
    is_stopping: bool = False
    is_held: bool = False
    # After a fault of lastcall: the workers see the supervisor end and drain by themselves, unkilled.
    is_abandoned: bool = False
    # Why calls of an agent name are not handed over any more, as a worker has found. A reload tries again.
    handover_off: dict[str, str] = field(default_factory=dict)
    # The last traceback of the user's own code that was shown, by slot.
    tracebacks: dict[int, str] = field(default_factory=dict)
