"""A generation in any state, without a process."""

from __future__ import annotations

from typing import Any

from lastcall.supervisor.config import Config
from lastcall.supervisor.fleet.generation import Generation
from lastcall.supervisor.fleet.histogram import Histogram
from lastcall.supervisor.fleet.shared import Shared
from lastcall.supervisor.fleet.states import SlotState
from lastcall.supervisor.receipt import Ledger, StopRecord
from lastcall.worker.base.condition import Condition


class Silent:
    """A logger that keeps the events."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def bind(self, **_: Any) -> Silent:
        return self

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    warning = info


def generation_in(state: SlotState) -> tuple[Generation, Silent]:
    """Return a generation that was created in the state, and the logger that it writes to."""
    log = Silent()
    shared = Shared(
        config=Config(),
        ledger=Ledger(),
        record=StopRecord(),
        log=log,
        known_pids=set(),
        on_change=lambda: None,
        may_sweep_unmarked=lambda: False,
        fence_seconds=Histogram([1.0]),
        drain_seconds=Histogram([1.0]),
    )
    launcher: Any = None  # no process is started here
    generation = Generation(0, 1, launcher=launcher, shared=shared, changed=Condition(), state=state)
    return generation, log
