"""How long to wait after failures in a row: doubling, capped, with jitter. Pure."""

from __future__ import annotations

import random

# 2 to this power times any first step is above any cap; a larger power would overflow a float some day.
MAX_DOUBLINGS = 64


class Backoff:
    """Counts the failures in a row, and says how long to wait after each.

    The delay after the n-th failure is `first` * 2^(n-1) seconds, at most `cap` seconds, less a random part
    of up to `jitter` (0 to 1) of it. Without the jitter whatever failed together would come back together.
    """

    __slots__ = ("_cap", "_first", "_jitter", "_random", "failures")

    def __init__(self, *, first: float, cap: float, jitter: float, rng: random.Random) -> None:
        self.failures = 0
        self._first = first
        self._cap = cap
        self._jitter = jitter
        self._random = rng

    def fail(self) -> float:
        """Count one failure and return the seconds to wait."""
        self.failures += 1
        step = min(self._cap, self._first * 2.0 ** min(self.failures - 1, MAX_DOUBLINGS))
        return step * (1 - self._jitter * self._random.random())

    def reset(self) -> None:
        """Forget the failures."""
        self.failures = 0
