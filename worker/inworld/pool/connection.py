"""One WebSocket to Inworld and the contexts on it, from the handshake's end to the socket's.

Two tasks, a reader and a writer, owned by `run`; whichever ends first, for whatever reason, ends the other,
and the socket is closed on every way out. Frames out go through a bounded buffer: callers wait in `room` when
it is full, and a peer that has taken nothing for too long is given up, so nobody waits in vain. Frames in
are handed on at once; who may be slow has a bound of its own, because one slow listener must not hold up the
other contexts.

Deadlines of all contexts are kept by one alarm, set only while something is owed: an idle connection wakes
nobody.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from lastcall.worker.base.clock import now
from lastcall.worker.inworld.pool import protocol
from lastcall.worker.inworld.pool.alarm import NEVER, Alarm
from lastcall.worker.inworld.pool.context import Context, Fate
from lastcall.worker.inworld.pool.errors import ConnectionLost, ContextError, Malformed
from lastcall.worker.inworld.pool.lifecycles import ContextState
from lastcall.worker.inworld.pool.outbox import Outbox
from lastcall.worker.inworld.pool.places import Line
from lastcall.worker.inworld.pool.protocol import Frame, Kind
from lastcall.worker.inworld.pool.timings import Timings

log = logging.getLogger("lastcall.inworld")

# Bytes that wait for the writer: above the first, `room` waits; above the second, the peer is given up.
MAX_UNSENT = 256 * 1024
MAX_UNSENT_EVER = 8 * 1024 * 1024
# So many frames that mean nothing, and the peer is not one that can be talked to.
MAX_MALFORMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What a connection reports to its pool."""

    retire: Callable[[Line], None]
    is_at_rest: Callable[[Connection], None]


class Connection:
    """A WebSocket after its handshake. `contexts` are those that the server may count."""

    def __init__(
        self, line: Line, ws: aiohttp.ClientWebSocketResponse, *, timings: Timings, hooks: Hooks
    ) -> None:
        self.line = line
        self.contexts: dict[str, Context] = {}
        self.idle_since = now()
        self.malformed = 0
        # How it ended: with close frames, or without; and whether with contexts on it.
        self.fate: Fate = "forced"
        self.was_lost = False
        self._ws = ws
        self._timings = timings
        self._hooks = hooks
        self._loop = asyncio.get_running_loop()
        self.outbox = Outbox(MAX_UNSENT)
        self._alarm = Alarm(self._look)
        self._leaving: asyncio.Future[str] = self._loop.create_future()
        self._goodbye: asyncio.Timeout | None = None
        self._close_at = NEVER

    async def run(self) -> None:
        """Read and write until the end; afterwards the socket is closed and every context has ended."""
        reason = "cancelled"
        try:
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(self._read())
                writing = group.create_task(self._write())
                reason = await self._leaving
                if not reason:
                    await self._say_goodbye(reading)
                reading.cancel()
                writing.cancel()
        finally:
            try:
                async with asyncio.timeout(0):  # at least: the response is closed, whoever was cancelled
                    await self._ws.close()
            except TimeoutError:
                log.debug("closed without a goodbye", extra={"connection": self.line.number})
            finally:
                # Nothing here waits: however often we are cancelled, the socket goes and everybody hears.
                self._abort()
                self._alarm.stop()
                self._lose(f"the connection has ended: {reason or 'closed by us'}")

    # -- what contexts and the pool ask -------------------------------------------------------------------

    def put(self, text: str) -> None:
        """Send a frame, after those before it."""
        self.outbox.put(text)
        if self.outbox.size > MAX_UNSENT_EVER:
            self._leave(f"{self.outbox.size} bytes wait to be sent")

    async def room(self) -> None:
        """Wait until there is room for more to send. Raises ConnectionLost when there never will be."""
        while self.outbox.size > MAX_UNSENT or self._leaving.done():
            if self._leaving.done():
                raise ConnectionLost("the connection is being ended")
            await self.outbox.room()

    def watch(self, at: float) -> None:
        """Look at the deadlines again at this time."""
        self._alarm.set(at)

    def rest(self) -> None:
        """Note that a context has ended here."""
        if not self.contexts:
            self.idle_since = now()
            self._hooks.is_at_rest(self)

    def close(self, at: float) -> None:
        """End it with a close frame, by `at` at the latest; again, to make that sooner."""
        if at < self._close_at:
            self._close_at = at
            if not self._leaving.done():
                self._leaving.set_result("")
            elif self._goodbye is not None and not self._goodbye.expired():
                self._goodbye.reschedule(self._loop.time() + max(0.0, at - now()))

    # -- the end ------------------------------------------------------------------------------------------

    async def _say_goodbye(self, reading: asyncio.Task[None]) -> None:
        try:
            async with asyncio.timeout(max(0.0, self._close_at - now())) as self._goodbye:
                await self.outbox.flushed()
                await self._ws.close(code=aiohttp.WSCloseCode.OK)
                # The reader may have been the one that shook hands: aiohttp has whoever comes first do it.
                await reading
        except TimeoutError:
            log.info("close frame not answered", extra={"connection": self.line.number})
        finally:
            self._goodbye = None

    def _leave(self, reason: str) -> None:
        if not self._leaving.done():
            self._leaving.set_result(reason)
            self._hooks.retire(self.line)
        self.outbox.wake()

    def _lose(self, why: str) -> None:
        self.was_lost = bool(self.contexts)
        for context in list(self.contexts.values()):
            context.lose(ConnectionLost(why))
        self.outbox.wake()
        if self._ws.close_code not in (None, aiohttp.WSCloseCode.ABNORMAL_CLOSURE):
            self.fate = "closed"

    def _abort(self) -> None:
        # A transport that is closed with data to send stays until its peer reads. Its socket is shut down
        # by another descriptor, because the transport's own may not be touched.
        sock = self._ws.get_extra_info("socket")
        try:
            fd = -1 if sock is None else sock.fileno()
        except OSError:
            return
        if fd < 0:
            return
        try:
            with socket.socket(fileno=os.dup(fd)) as double:
                double.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it is gone already

    # -- the two tasks --------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            message = await self._ws.receive()
            if message.type is aiohttp.WSMsgType.TEXT:
                self._take(message.data)
            elif message.type is aiohttp.WSMsgType.BINARY:
                self._count_malformed("a binary frame")
            else:
                break
        self._leave(f"by the other side, code {self._ws.close_code}")

    async def _write(self) -> None:
        stall = self._timings.stall
        try:
            await self.outbox.write(self._ws.send_str, lambda at: self.watch(at + stall))
        except ConnectionError as error:
            self._leave(f"can't send: {error}")

    def _look(self) -> None:
        """The alarm: have those expire that are due, and set it for the next."""
        at = now()
        stalled_at = self.outbox.sending_since + self._timings.stall
        if stalled_at <= at:
            self._leave(f"nothing was read there for {self._timings.stall:g} s")
            return
        for context in list(self.contexts.values()):
            if context.deadline <= at:
                context.expire()
        due = min((context.deadline for context in self.contexts.values()), default=NEVER)
        due = min(due, stalled_at)
        if due < NEVER:
            self.watch(due)

    # -- frames in ------------------------------------------------------------------------------------------

    def _take(self, text: str) -> None:
        try:
            frame = protocol.parse(text)
        except Malformed as error:
            self._count_malformed(str(error))
            return
        if frame.context is None:
            self._take_nameless(frame)
            return
        context = self.contexts.get(frame.context)
        if context is not None:
            context.take(frame)
        # Else it is for a context that has ended here; its last frames were under way.

    def _take_nameless(self, frame: Frame) -> None:
        """Find out whose an error without a context is: the create that waits longest, or the only one."""
        if frame.kind is not Kind.ERROR:
            return
        log.warning("error without a context", extra={"code": frame.code, "text": frame.message})
        contexts = list(self.contexts.values())
        waiting = [each for each in contexts if not each.is_created and not each.is_told]
        if waiting:
            whose = waiting[0]
        elif len(contexts) == 1:
            whose = contexts[0]
        else:
            self._hooks.retire(self.line)  # one of them is about to be silent
            return
        if whose.state is ContextState.CANCELLING:
            whose.hint()
        else:
            whose.fail(ContextError(frame.message or f"the server's error {frame.code}", code=frame.code))

    def _count_malformed(self, what: str) -> None:
        """Give the connection no new context after one, and give it up after a few: a frame is missing."""
        self.malformed += 1
        log.warning("malformed frame", extra={"what": what, "connection": self.line.number})
        self._hooks.retire(self.line)
        if self.malformed >= MAX_MALFORMED:
            self._leave(f"{self.malformed} malformed frames")
