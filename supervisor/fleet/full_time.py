"""How long no worker has taken a job although workers are up, by reason."""

from __future__ import annotations

from collections.abc import Iterable

from lastcall.worker.base.wire import FULL_REASONS


class FullTime:
    """The seconds in which nobody took jobs, by reason; those that pass at this moment included.

    `reasons` is empty while a worker takes jobs, and `since` says when the last one ceased to.
    """

    def __init__(self) -> None:
        self.reasons: tuple[str, ...] = ()
        self.since: float | None = None
        self.seconds: dict[str, float] = dict.fromkeys(FULL_REASONS, 0.0)
        self._noted_at = 0.0

    def note(self, reasons: Iterable[str], now: float) -> None:
        """Take why no worker takes a job now; nothing when one does."""
        for reason in self.reasons:
            self.seconds[reason] += now - self._noted_at
        self._noted_at = now
        # Of a newer worker the reason may be one that has no counter here.
        self.reasons = tuple(reason for reason in self.seconds if reason in set(reasons))
        if not self.reasons:
            self.since = None
        elif self.since is None:
            self.since = now
