"""What a close found open and how each of it ended; and the figures of a pool that runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Fate = Literal["closed", "forced", "leaked"]
Counts = dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """Connections and contexts that were open when the close began, by fate.

    closed: the other side agreed, in order. forced: it did not in time, and the socket was taken away.
    leaked: still there at the end, and so are `tasks` tasks; it is a fault of ours.
    """

    connections: dict[str, int] = field(default_factory=dict)
    contexts: dict[str, int] = field(default_factory=dict)
    tasks: int = 0
    seconds: float = 0.0

    @property
    def fate(self) -> Fate:
        """The worst of all fates."""
        seen = {*self.connections, *self.contexts}
        if "leaked" in seen or self.tasks:
            return "leaked"
        return "forced" if "forced" in seen else "closed"

    @property
    def counts(self) -> Counts:
        """As the receipt has it."""
        return {"connections": dict(self.connections), "contexts": dict(self.contexts)}


@dataclass(slots=True)
class Tally:
    """The census while it is taken."""

    connections: Counter[str] = field(default_factory=Counter)
    contexts: Counter[str] = field(default_factory=Counter)

    def census(self, *, connections: int, contexts: int, tasks: int, seconds: float) -> Census:
        """Return the result; the arguments are what is still there."""
        for counter, left in ((self.connections, connections), (self.contexts, contexts)):
            if left:
                counter["leaked"] = left
        return Census(
            connections=dict(self.connections),
            contexts=dict(self.contexts),
            tasks=tasks,
            seconds=round(seconds, 3),
        )


@dataclass(slots=True)
class Meter:
    """What a pool has done since it opened."""

    granted: int = 0
    waited: int = 0
    wait_seconds: float = 0.0
    refusals: int = 0
    failed_dials: int = 0
    retries: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a pool has now, and its meter."""

    connections: int
    dialling: int
    contexts: int
    waiters: int
    granted: int
    waited: int
    wait_seconds: float
    refusals: int
    failed_dials: int
    retries: int
    lost: int
