"""How long to wait after failures in a row: doubling, capped, with jitter. Pure."""

from __future__ import annotations

import random


class Backoff:
    """Count failures in a row; the delay after the n-th is first * 2^(n-1), capped, less up to its `jitter`.

    The jitter keeps those that failed together from trying again together.
    """

    __slots__ = ("_cap", "_first", "_jitter", "_random", "failures")

    def __init__(self, first: float, cap: float, *, jitter: float, random: random.Random) -> None:
        self.failures = 0
        self._first = first
        self._cap = cap
        self._jitter = jitter
        self._random = random

    def fail(self) -> float:
        """Count one failure and return the seconds to wait."""
        self.failures += 1
        # The exponent has a bound, because 2.0**1024 raises OverflowError.
        step = min(self._cap, self._first * 2.0 ** min(self.failures - 1, 64))
        return step * (1 - self._jitter * self._random.random())

    def succeed(self) -> None:
        """Forget the failures."""
        self.failures = 0
