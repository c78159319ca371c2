"""Waiting for something to become true, with a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lastcall.worker.base.clock import never, now


class Condition:
    """Wakes every waiter when something that a predicate may depend on has changed.

    A shared `asyncio.Event` would lose wakeups, because a waiter has to clear the event, and a clear may fall
    between a set and the wake of another waiter. A `Condition` has one future for each waiter instead. A
    woken waiter reads the predicate and the deadline afresh, so a deadline may move during the wait.
    """

    __slots__ = ("_first", "_waiters")

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()
        # Woken before all others: the loop runs what is woken in this order.
        self._first: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Have every waiter look again."""
        for waiters in (self._first, self._waiters):
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def until(
        self,
        predicate: Callable[[], object],
        deadline: Callable[[], float | None] = never,
        *,
        is_first: bool = False,
    ) -> bool:
        """Wait until the predicate holds (True) or the deadline has passed (False); both are read afresh.

        `is_first`: look before the waiters without it.
        """
        waiters = self._first if is_first else self._waiters
        while not predicate():
            at = deadline()
            left = None if at is None else at - now()
            if left is not None and left <= 0:
                return False
            waiter = asyncio.get_running_loop().create_future()
            waiters.add(waiter)
            try:
                async with asyncio.timeout(left):
                    await waiter
            except TimeoutError:
                pass
            finally:
                waiters.discard(waiter)
        return True
