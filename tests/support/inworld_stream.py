"""A context of the pool as a test uses it: send text, read frames, release or cancel.

The frames of the server are buffered up to a bound. The context of a reader that falls further behind is
cancelled, and the reader gets an error. Waiting for the reader would hold up every other context of the
connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lastcall.worker.inworld.pool import protocol
from lastcall.worker.inworld.pool.context import Context
from lastcall.worker.inworld.pool.errors import ContextCancelled, InworldError, Overflow
from lastcall.worker.inworld.pool.pool import InworldPool
from lastcall.worker.inworld.pool.protocol import Action, Document, Frame, Kind

MAX_UNREAD = 16 * 1024 * 1024


class Stream:
    """One context of a pool. Read it from one task at a time."""

    def __init__(self, pool: InworldPool, max_unread: int = MAX_UNREAD) -> None:
        self.context: Context
        self._pool = pool
        self._max_unread = max_unread
        self._unread: deque[Frame] = deque()
        self._unread_bytes = 0
        self._discards = False
        self._is_over = False
        # Its reader has seen the error that it ended with.
        self._is_told = False
        self._error: InworldError | None = None
        self._changed: set[asyncio.Future[None]] = set()

    # -- what its user does -------------------------------------------------------------------------------

    async def created(self) -> None:
        """Wait until the server has created the context. Raises what it ended with if it never did."""
        while not self.context.is_created:
            if self._is_over:
                raise self._error or ContextCancelled("closed before it was created")
            await self._change()

    async def send_text(self, text: str) -> None:
        """Send text of any length, in pieces that the server takes."""
        await self._send(Action.TEXT, protocol.send_text(text))

    async def flush(self) -> None:
        """Have the server speak what it has; `flushCompleted` ends that."""
        await self._send(Action.FLUSH, protocol.flush())

    async def speak(self, text: str) -> AsyncIterator[Frame]:
        """Say a text as the last of this context, and yield its frames until the context has closed."""
        await self.send_text(text)
        await self.flush()
        self.close()
        async for frame in self:
            yield frame

    def close(self) -> None:
        """Have the server speak what it has, and then close; read on until the end."""
        self._pool.close(self.context)

    def cancel(self) -> None:
        """Stop at once: nothing more is read, and the place is free when the server says so."""
        self._discard()
        self._pool.cancel(self.context)

    async def release(self) -> None:
        """Close, and return when the server has; what it still says is discarded. Cancelled, it cancels."""
        try:
            self.close()
            self._discard()
            while not self._is_over:
                await self._change()
        except BaseException:
            self.cancel()
            raise
        if self._error is not None and not self._is_told and not isinstance(self._error, ContextCancelled):
            raise self._error

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Frame:
        """Return the next frame, until the context is closed. Raises what it ended with otherwise."""
        while not self._unread:
            if self._is_over:
                if self._error is not None:
                    self._is_told = True
                    raise self._error
                raise StopAsyncIteration
            await self._change()
        frame = self._unread.popleft()
        self._unread_bytes -= len(frame.text)
        return frame

    # -- what the context does ----------------------------------------------------------------------------

    def on_frame(self, frame: Frame, context: Context) -> None:
        if not self._discards and frame.kind is not Kind.CREATED:
            self._unread.append(frame)
            self._unread_bytes += len(frame.text)
            if self._unread_bytes > self._max_unread:
                unread = self._unread_bytes
                self._discard()
                error = Overflow(f"{unread} bytes are unread, at most {self._max_unread} are kept")
                self._pool.fail(context, error)
        self._notify()

    def on_end(self, error: InworldError | None, frame: Frame | None, context: Context) -> None:
        self._is_over, self._error = True, error
        self._notify()

    # -- inside -------------------------------------------------------------------------------------------

    async def _send(self, action: Action, document: Document) -> None:
        if self._is_over:
            raise self._error or ContextCancelled("the context is closed")
        self._pool.send(self.context, action, document)
        await self._pool.room(self.context)

    def _discard(self) -> None:
        self._discards = True
        self._unread.clear()
        self._unread_bytes = 0

    def _notify(self) -> None:
        for waiter in self._changed:
            if not waiter.done():
                waiter.set_result(None)

    async def _change(self) -> None:
        # A future for each waiter: what changes is looked at by everybody, and nothing is to be cleared.
        waiter = asyncio.get_running_loop().create_future()
        self._changed.add(waiter)
        try:
            await waiter
        finally:
            self._changed.discard(waiter)


async def acquire(
    pool: InworldPool, config: Document, *, timeout: float | None = None, max_unread: int = MAX_UNREAD
) -> Stream:
    """Return a context that the server has created. Raises InworldError, within `timeout` seconds."""
    stream = Stream(pool, max_unread)
    stream.context = pool.start(config, stream, timeout=timeout)
    try:
        await stream.created()
    except BaseException:
        stream.cancel()
        raise
    return stream


@asynccontextmanager
async def acquired(
    pool: InworldPool, config: Document, *, timeout: float | None = None
) -> AsyncIterator[Stream]:
    """Acquire a context for a block; it is released after the block, or cancelled when the block raises."""
    stream = await acquire(pool, config, timeout=timeout)
    try:
        yield stream
    except BaseException:
        stream.cancel()
        raise
    await stream.release()
