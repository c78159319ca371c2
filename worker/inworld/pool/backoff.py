"""How long to wait after failed dials: doubling, capped, with jitter. Pure."""

from __future__ import annotations

import random


class Backoff:
    """Counts the failures in a row; the delay after the n-th is first * 2^(n-1), capped, less up to half.

    The jitter keeps machines that were refused together from coming back together.
    """

    __slots__ = ("_cap", "_first", "_random", "failures")

    def __init__(self, first: float, cap: float, random: random.Random) -> None:
        self.failures = 0
        self._first = first
        self._cap = cap
        self._random = random

    def fail(self) -> float:
        """Count one failure and return the seconds to wait."""
        self.failures += 1
        step: float = min(self._cap, self._first * 2 ** min(self.failures - 1, 32))
        return step * self._random.uniform(0.5, 1.0)

    def succeed(self) -> None:
        """Forget the failures."""
        self.failures = 0
