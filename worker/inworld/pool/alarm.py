"""One timer for many deadlines: it rings at the earliest of them, and not at all when there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lastcall.worker.base.clock import now

NEVER = float("inf")


class Alarm:
    """Calls `ring` at the earliest of the times asked for. That forgets the others: who rings asks again."""

    __slots__ = ("_handle", "_ring", "at")

    def __init__(self, ring: Callable[[], None]) -> None:
        self.at = NEVER
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None

    def set(self, at: float) -> None:
        """Ring at this time, if not sooner."""
        if at >= self.at:
            return
        if self._handle is not None:
            self._handle.cancel()
        self.at = at
        self._handle = asyncio.get_running_loop().call_later(max(0.0, at - now()), self._go)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def _go(self) -> None:
        self._handle, self.at = None, NEVER
        self._ring()
