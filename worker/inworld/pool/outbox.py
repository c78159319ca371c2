"""Frames that wait to be written to one WebSocket, in order, with their size known."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from lastcall.worker.base.clock import now
from lastcall.worker.inworld.pool.timer import NEVER


class Outbox:
    """A queue with one writer. `put` never waits; who could overfill it looks at `size` or waits in `room`.

    `sending_since` is when the frame that is being written was begun, NEVER while there is none.
    """

    def __init__(self, mark: int) -> None:
        self.size = 0
        self.sending_since = NEVER
        self._mark = mark
        self._frames: deque[str] = deque()
        self._work: asyncio.Future[None] | None = None
        self._room: deque[asyncio.Future[None]] = deque()
        self._flushed: asyncio.Future[None] | None = None

    def put(self, text: str) -> None:
        self._frames.append(text)
        self.size += len(text)
        if self._work is not None and not self._work.done():
            self._work.set_result(None)

    def clear(self) -> None:
        """Drop what has not been begun."""
        self.size -= sum(map(len, self._frames))
        self._frames.clear()

    async def room(self) -> None:
        """Wait until the writer has come below the mark, or `wake` is called."""
        if self.size > self._mark:
            waiter = asyncio.get_running_loop().create_future()
            self._room.append(waiter)
            await waiter

    async def flushed(self) -> None:
        """Wait until everything is written."""
        if self._frames or self.sending_since < NEVER:
            self._flushed = asyncio.get_running_loop().create_future()
            await self._flushed

    def wake(self) -> None:
        """Have everybody in `room` look again."""
        while self._room:
            waiter = self._room.popleft()
            if not waiter.done():
                waiter.set_result(None)

    async def write(self, send: Callable[[str], Awaitable[None]], begun: Callable[[float], None]) -> None:
        """Write for ever; `begun` is told when each frame is begun. Raises what `send` does."""
        loop = asyncio.get_running_loop()
        while True:
            while self._frames:
                text = self._frames.popleft()
                self.sending_since = at = now()
                begun(at)
                await send(text)
                self.sending_since = NEVER
                self.size -= len(text)
                if self._room and self.size <= self._mark:
                    self.wake()
            if self._flushed is not None and not self._flushed.done():
                self._flushed.set_result(None)
            self._work = loop.create_future()
            await self._work
