"""The report of a pool's close: how many connections and contexts were open, and how each ended."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lastcall.worker.base.wire import Counts, ResourceFate


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseReport:
    """Connections and contexts that were open when the close began, by fate.

    `closed`: the server agreed, in order. `forced`: the server did not answer in time, so the pool took the
    socket away. `leaked`: still there at the end, which is a fault in lastcall. `tasks`: how many tasks are
    still there at the end, a leak too.
    """

    connections: dict[str, int] = field(default_factory=dict)
    contexts: dict[str, int] = field(default_factory=dict)
    tasks: int = 0
    seconds: float = 0.0

    @property
    def fate(self) -> ResourceFate:
        """The worst of all fates."""
        seen = {*self.connections, *self.contexts}
        if "leaked" in seen or self.tasks:
            return "leaked"
        return "forced" if "forced" in seen else "closed"

    @property
    def counts(self) -> Counts:
        """The counts as the receipt has them."""
        return {"connections": dict(self.connections), "contexts": dict(self.contexts)}


@dataclass(slots=True)
class CloseTally:
    """The counts of a close. `is_counting`: the close is under way."""

    is_counting: bool = False
    connections: Counter[str] = field(default_factory=Counter)
    contexts: Counter[str] = field(default_factory=Counter)

    def report(self, *, connections: int, contexts: int, tasks: int, seconds: float) -> CloseReport:
        """Return the result; the arguments are what is still there."""
        for counter, left in ((self.connections, connections), (self.contexts, contexts)):
            if left:
                counter["leaked"] = left
        return CloseReport(
            connections=dict(self.connections),
            contexts=dict(self.contexts),
            tasks=tasks,
            seconds=round(seconds, 3),
        )
