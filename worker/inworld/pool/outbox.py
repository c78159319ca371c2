"""Frames that wait to be written to one WebSocket, in order, with their size known.

A frame is text, or bytes that stand for a ping or pong.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from lastcall.worker.base.clock import now
from lastcall.worker.inworld.pool.timer import NEVER


class Outbox:
    """A queue with one writer. `put` never waits: a caller that could overfill the queue waits in `room`.

    `size`: characters that are not written. `sending_since`: when the writer began the present frame, NEVER
    while there is none. `high_water`: the size above which `room` waits.
    """

    def __init__(self, high_water: int) -> None:
        self.size = 0
        self.sending_since = NEVER
        self._high_water = high_water
        self._frames: deque[str | bytes] = deque()
        self._work: asyncio.Future[None] | None = None
        self._room: deque[asyncio.Future[None]] = deque()
        self._flushed: asyncio.Future[None] | None = None

    def put(self, frame: str | bytes) -> None:
        self._frames.append(frame)
        self.size += len(frame)
        if self._work is not None and not self._work.done():
            self._work.set_result(None)

    def clear(self) -> None:
        """Drop every frame that the writer has not begun."""
        self.size -= sum(map(len, self._frames))
        self._frames.clear()

    async def room(self) -> None:
        """Wait until the size is at most the high-water mark, or `wake` is called."""
        if self.size > self._high_water:
            waiter = asyncio.get_running_loop().create_future()
            self._room.append(waiter)
            await waiter

    async def flushed(self) -> None:
        """Wait until everything is written."""
        if self._frames or self.sending_since < NEVER:
            self._flushed = asyncio.get_running_loop().create_future()
            await self._flushed

    def wake(self) -> None:
        """End every wait in `room`."""
        while self._room:
            waiter = self._room.popleft()
            if not waiter.done():
                waiter.set_result(None)

    async def write(
        self,
        send: Callable[[str], Awaitable[None]],
        begun: Callable[[float], None],
        control: Callable[[bytes], Awaitable[None]] | None = None,
    ) -> None:
        """Write for ever: `send` gets text, and `control` bytes. Raises what they do.

        `begun` gets the time at which each frame is begun.
        """
        loop = asyncio.get_running_loop()
        while True:
            while self._frames:
                frame = self._frames.popleft()
                self.sending_since = at = now()
                begun(at)
                if isinstance(frame, str):
                    await send(frame)
                elif control is not None:
                    await control(frame)
                self.sending_since = NEVER
                self.size -= len(frame)
                if self._room and self.size <= self._high_water:
                    self.wake()
            if self._flushed is not None and not self._flushed.done():
                self._flushed.set_result(None)
            self._work = loop.create_future()
            await self._work
