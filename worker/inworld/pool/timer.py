"""One timer for many deadlines: it fires at the earliest of them, and is not set while there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lastcall.worker.base.clock import now

NEVER = float("inf")


class Timer:
    """Calls `on_due` at the earliest of the times that were set.

    A timer that has fired has forgotten all other times. `on_due` looks at every deadline and sets the timer
    again, so that no list of deadlines is kept twice.
    """

    __slots__ = ("_handle", "_on_due", "at")

    def __init__(self, on_due: Callable[[], None]) -> None:
        self.at = NEVER
        self._on_due = on_due
        self._handle: asyncio.TimerHandle | None = None

    def set(self, at: float) -> None:
        """Fire at this time, if no earlier time is set."""
        if at >= self.at:
            return
        if self._handle is not None:
            self._handle.cancel()
        self.at = at
        self._handle = asyncio.get_running_loop().call_later(max(0.0, at - now()), self._fire)

    def stop(self) -> None:
        """Fire no more, whatever is set from now on."""
        self.at = -NEVER
        if self._handle is not None:
            self._handle.cancel()

    def _fire(self) -> None:
        self._handle, self.at = None, NEVER
        self._on_due()
