"""One WebSocket to Inworld and the contexts on it, from the end of the handshake to the end of the socket.

`run` owns two tasks, a reader and a writer. The end of either task, for any reason, ends the other, and the
socket is closed on every way out. Frames to the server go through a bounded buffer, and callers wait in
`room` while the buffer is full. A peer that has read nothing for too long is given up, so that no caller
waits in vain. Frames from the server are handed on at once. A listener that may be slow has to bound its
buffer, because one slow listener must not hold up the other contexts.

One timer keeps the deadlines of all contexts, and the pings while there is none (`pinging`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVarTuple

import aiohttp

from lastcall.worker.base.clock import now
from lastcall.worker.base.wire import ResourceFate
from lastcall.worker.inworld.pool import protocol
from lastcall.worker.inworld.pool.capacity import PoolEntry
from lastcall.worker.inworld.pool.context import Context, Effects
from lastcall.worker.inworld.pool.errors import ConnectionLost, Malformed
from lastcall.worker.inworld.pool.lifecycles import ConnectionState
from lastcall.worker.inworld.pool.outbox import Outbox
from lastcall.worker.inworld.pool.pinging import Pinging, Verdict
from lastcall.worker.inworld.pool.protocol import Frame, Kind
from lastcall.worker.inworld.pool.timer import NEVER, Timer
from lastcall.worker.inworld.pool.timings import Timings

log = logging.getLogger("lastcall.inworld")
Ts = TypeVarTuple("Ts")

# Bytes that wait for the writer: above the first number `room` waits, above the second the peer is given up.
# Ours: five contexts with 1,000 characters each are 5 kB, so both are far above what speech needs.
MAX_UNSENT = 256 * 1024
MAX_UNSENT_EVER = 8 * 1024 * 1024
# Messages by which a server is heard. A close is not among them.
SAYINGS = (
    aiohttp.WSMsgType.TEXT,
    aiohttp.WSMsgType.BINARY,
    aiohttp.WSMsgType.PING,
    aiohttp.WSMsgType.PONG,
)
# A ping and a pong, as they stand in the outbox.
PING, PONG = b"ping", b"pong"
# Seconds between a missing pong and the end of the connection, in which a pong that came during a pause of
# this process is read. Ours: many turns of the loop.
UNREAD_SECONDS = 0.1
# Malformed frames after which a connection is ended. Ours: one may be an accident, three are a broken peer.
MAX_MALFORMED = 3


class Act(Protocol):
    """Calls a method of a context and performs the effects. An exception ends that context alone."""

    def __call__(self, context: Context, method: Callable[[*Ts], Effects], *args: *Ts) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """The calls by which a connection reports to its pool.

    `act` calls a method of a context on this connection and performs its effects. `retire` gets an entry that
    is to take no new context. `on_leave` gets a connection that ends otherwise than by a close, with the
    reason, before the contexts on it are told. `on_idle` gets a connection whose last context has ended.
    """

    act: Act
    retire: Callable[[PoolEntry], None]
    on_leave: Callable[[Connection, str], None]
    on_idle: Callable[[Connection], None]


class Connection:
    """A WebSocket after its handshake. `contexts` are those that the server may count, by id.

    `opened_at`: when the handshake ended. `heard_at`: when the server last said something.
    `create_seconds`: how long its last answer to a create took. `created_at`: when that answer came.
    """

    def __init__(
        self, entry: PoolEntry, ws: aiohttp.ClientWebSocketResponse, *, timings: Timings, callbacks: Callbacks
    ) -> None:
        self.entry = entry
        self.contexts: dict[str, Context] = {}
        self.opened_at = self.idle_since = self.heard_at = self.created_at = now()
        self.create_seconds = 0.0
        self.malformed = 0
        # The connection ended with close frames (closed) or without them (forced).
        self.fate: ResourceFate = "forced"
        # The connection ended while contexts were open on it.
        self.was_lost = False
        # The socket is gone: a context that is still here would wait for ever.
        self.is_gone = False
        self.outbox = Outbox(MAX_UNSENT)
        self._ws = ws
        self._timings = timings
        self._pinging = Pinging(timings.ping, timings.pong)
        # The payload of the last ping of the server's, while its pong is not written.
        self._pong: bytes | None = None
        self._callbacks = callbacks
        self._loop = asyncio.get_running_loop()
        self._timer = Timer(self._on_timer)
        self._leaving: asyncio.Future[str] = self._loop.create_future()
        self._close_handshake: asyncio.Timeout | None = None
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
                    await self._shake_hands(reading)
                reading.cancel()
                writing.cancel()
        finally:
            # A connection whose task was cancelled has said nothing yet: the pool would put the next context
            # on it.
            self._callbacks.retire(self.entry)
            try:
                async with asyncio.timeout(0):  # closes the response at least, also in a cancelled task
                    await self._ws.close()
            except TimeoutError:
                log.debug("closed without a goodbye", extra={"connection": self.entry.number})
            finally:
                # Nothing here waits: however often this task is cancelled, the socket is closed and all
                # contexts are told of the end.
                self._abort()
                self._timer.stop()
                self._lose_contexts(f"the connection has ended: {reason or 'closed by us'}")

    # -- what the pool asks -------------------------------------------------------------------------------

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
        self._timer.set(at)

    def report_idle(self) -> None:
        """Report the connection as idle if no context is on it."""
        if not self.contexts:
            self.idle_since = now()
            self._pinging.idle(self.idle_since)
            self._callbacks.on_idle(self)
            if self.entry.state is ConnectionState.OPEN and self._pinging.due < NEVER:
                self.watch(self._pinging.due)

    def longest_create(self, since: float) -> float:
        """Return the seconds of the create that waits longest here, or of one answered since then."""
        at = now()
        waiting = [at - each.sent_at for each in self.contexts.values() if not each.is_created]
        return max(waiting, default=self.create_seconds if self.created_at >= since else 0.0)

    def close(self, at: float) -> None:
        """End the connection with a close frame, by `at` at the latest. A later call can only be sooner."""
        if at < self._close_at:
            self._close_at = at
            if not self._leaving.done():
                self._leaving.set_result("")
            elif self._close_handshake is not None and not self._close_handshake.expired():
                self._close_handshake.reschedule(self._loop.time() + max(0.0, at - now()))

    # -- the end ------------------------------------------------------------------------------------------

    async def _shake_hands(self, reading: asyncio.Task[None]) -> None:
        """Send what waits, then a close frame, and wait for the server's."""
        try:
            async with asyncio.timeout(max(0.0, self._close_at - now())) as self._close_handshake:
                await self.outbox.flushed()
                await self._ws.close(code=aiohttp.WSCloseCode.OK)
                # aiohttp lets whichever comes first, close() or the reader, complete the handshake.
                await reading
        except TimeoutError:
            log.info("close frame not answered", extra={"connection": self.entry.number})
        finally:
            self._close_handshake = None

    def _leave(self, reason: str) -> None:
        if not self._leaving.done():
            self._leaving.set_result(reason)
            self._callbacks.on_leave(self, reason)
        self.outbox.wake()

    def _lose_contexts(self, why: str) -> None:
        self.is_gone, self.was_lost = True, bool(self.contexts)
        for context in list(self.contexts.values()):
            self._callbacks.act(context, context.lose, ConnectionLost(why))
        self.outbox.wake()
        if self._ws.close_code not in (None, aiohttp.WSCloseCode.ABNORMAL_CLOSURE):
            self.fate = "closed"

    def _abort(self) -> None:
        # A transport that was closed with data to send stays until its peer reads. The socket is shut down
        # through another descriptor, because asyncio forbids a transport's own socket to be closed.
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

    # -- the two tasks ------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            message = await self._ws.receive()
            if message.type in SAYINGS:
                self.heard_at = now()
            if message.type is aiohttp.WSMsgType.TEXT:
                self._take(message.data)
            elif message.type is aiohttp.WSMsgType.BINARY:
                self._count_malformed("a binary frame")
            elif message.type is aiohttp.WSMsgType.PONG:
                self._pinging.pong(self.heard_at)
                self.watch(self._pinging.due)
            elif message.type is aiohttp.WSMsgType.PING:
                if self._pong is None:  # one pong answers every ping before it: RFC 6455, section 5.5.3
                    self.outbox.put(PONG)
                self._pong = message.data
            else:
                break
        self._leave(f"by the other side, code {self._ws.close_code}")

    async def _write(self) -> None:
        stall = self._timings.stall
        try:
            await self.outbox.write(self._ws.send_str, lambda at: self._timer.set(at + stall), self._control)
        except ConnectionError as error:
            self._leave(f"can't send: {error}")

    async def _control(self, frame: bytes) -> None:
        if frame == PING:
            await self._ws.ping()
        else:
            payload, self._pong = self._pong or b"", None
            await self._ws.pong(payload)

    def _on_timer(self) -> None:
        """Have the contexts expire whose deadline is over, or ping, and set the timer for the next."""
        at = now()
        stalled_at = self.outbox.sending_since + self._timings.stall
        if stalled_at <= at:
            self._leave(f"nothing was read there for {self._timings.stall:g} s")
            return
        for context in list(self.contexts.values()):
            if context.deadline <= at:
                self._callbacks.act(context, context.expire, at)
        due = min((context.deadline for context in self.contexts.values()), default=NEVER)
        if not self.contexts:
            due = self._look_at_idle(at)
        due = min(due, stalled_at)
        if due < NEVER:
            self.watch(due)

    def _look_at_idle(self, at: float) -> float:
        """Ping an idle connection in time, or give it up; return when to look again."""
        if self._leaving.done() or self.entry.state is not ConnectionState.OPEN:
            return NEVER
        verdict = self._pinging.look(at)
        if verdict is Verdict.PING:
            self.outbox.put(PING)
        elif verdict is Verdict.DEAD:
            self._loop.call_later(UNREAD_SECONDS, self._end_if_dead, self.heard_at)
        return self._pinging.due

    def _end_if_dead(self, heard_at: float) -> None:
        """End an idle connection that has heard nothing since this time; else go on with its pings."""
        if self.contexts or self._leaving.done():
            return
        if self.heard_at > heard_at:
            self.report_idle()
            return
        log.info("idle connection is dead", extra={"connection": self.entry.number})
        self._leave(f"no pong within {self._timings.pong:g} s")

    # -- frames from the server ---------------------------------------------------------------------------

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
            self._callbacks.act(context, context.take, frame, self.heard_at)
        # Else the frame is for a context that has ended here, and was under way.

    def _take_nameless(self, frame: Frame) -> None:
        """Give a nameless error to an unanswered cancel, else to a create, else to the only context.

        A server that does not know cancel_context may refuse it without a name. A wrong guess costs one
        close_context for a cancel, and for a create the context of its owner.
        """
        if frame.kind is not Kind.ERROR:
            return
        log.warning("error without a context", extra={"code": frame.code, "text": frame.message})
        contexts = list(self.contexts.values())
        waiting = [each for each in contexts if each.unanswered_cancels]
        waiting = waiting or [each for each in contexts if not each.is_created and not each.is_told]
        if waiting:
            whose = waiting[0]
        elif len(contexts) == 1:
            whose = contexts[0]
        else:
            self._callbacks.retire(self.entry)  # one of the contexts is about to be silent
            return
        self._callbacks.act(whose, whose.take_nameless, frame, now())

    def _count_malformed(self, what: str) -> None:
        """Give the connection no new context, because a frame is missing; end it after a few."""
        self.malformed += 1
        log.warning("malformed frame", extra={"what": what, "connection": self.entry.number})
        self._callbacks.retire(self.entry)
        if self.malformed >= MAX_MALFORMED:
            self._leave(f"{self.malformed} malformed frames")
