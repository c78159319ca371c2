"""Time. All deadlines of the project are absolute readings of `now()`.

CLOCK_MONOTONIC is the same for every process of a machine and does not move when the wall clock is set.
"""

from __future__ import annotations

import time

now = time.monotonic


def never() -> float | None:
    """Stand in for a deadline where there is none."""
    return None
