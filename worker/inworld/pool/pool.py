"""The pool: contexts for whoever asks, on as few connections as they need.

`slots` decides, `Connection` and `Context` do; this module owns the tasks and the clock. It dials while
somebody waits, no more connections than those need; it closes what is idle, all but one, and replaces that
one before the server's patience is over; it closes down in order (`closing`).

Tasks: one for each connection, which dials, serves and ends it, and one that waits for the close. All are in
one TaskGroup. A caller owns none: when it is cancelled, its context is, and nobody else's.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from types import TracebackType

import aiohttp

from lastcall.worker.base.backoff import Backoff
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.inworld.pool import closing, idling
from lastcall.worker.inworld.pool.alarm import Alarm
from lastcall.worker.inworld.pool.census import Census, Figures, Meter, Tally
from lastcall.worker.inworld.pool.connection import Connection, Hooks
from lastcall.worker.inworld.pool.context import Context, Fate, Sink
from lastcall.worker.inworld.pool.dialling import DialError, dial
from lastcall.worker.inworld.pool.errors import KeyRefused, PoolClosed
from lastcall.worker.inworld.pool.lifecycles import LineState
from lastcall.worker.inworld.pool.places import Hold, Line, Slots, Ticket
from lastcall.worker.inworld.pool.protocol import Document
from lastcall.worker.inworld.pool.stream import MAX_UNREAD, Stream
from lastcall.worker.inworld.pool.timings import Timings

log = logging.getLogger("lastcall.inworld")

# Of each delay. Ours: machines that Inworld refused together must not come back together.
REDIAL_JITTER = 0.5


class InworldPool:
    """Connections to one Inworld account; use as an async context manager.

    `key` is sent as it is. Contexts are opened by `acquire`, or by `start` for those who want frames by
    callback.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        max_connections: int = 20,
        max_contexts: int = 5,
        idle_connection_timeout: float = 300.0,
        acquire_timeout: float = 30.0,
        max_unread: int = MAX_UNREAD,
        timings: Timings | None = None,
        seed: int | None = None,
    ) -> None:
        self.url = url
        self.timings = timings or Timings()
        self.slots = Slots(max_connections, max_contexts)
        self.connections: dict[Line, Connection] = {}
        self.tally = Tally()
        self.changed = Condition()
        self.waiting: dict[Context, float] = {}
        self.tasks: dict[Line, asyncio.Task[None]] = {}
        self.close_at: float | None = None
        self._key = key
        self._idle_timeout = idle_connection_timeout
        self._acquire_timeout = acquire_timeout
        self._max_unread = max_unread
        self._backoff = Backoff(
            self.timings.retry_first,
            self.timings.retry_cap,
            jitter=REDIAL_JITTER,
            random=random.Random(seed),
        )
        self._redial_at = 0.0
        self._dialled_at: dict[Line, float] = {}
        self._hooks = Hooks(retire=self.retire, is_at_rest=self._is_at_rest)
        self._alarm = Alarm(self._look)
        self._live = 0
        self._meter = Meter()
        self.is_open = False
        self._began = 0.0
        self._group = asyncio.TaskGroup()
        self._census: asyncio.Future[Census]
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> InworldPool:
        await self._group.__aenter__()
        # One connection is one socket, kept by us: aiohttp is to keep and limit none.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector)
        self._census = asyncio.get_running_loop().create_future()
        keeper = self._group.create_task(self._keep())
        keeper.add_done_callback(lambda _: self._take_census())
        self.is_open = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.aclose()
        except BaseException as interruption:
            # The group cancels what is left; each connection takes its socket away by itself.
            await self._group.__aexit__(type(interruption), interruption, interruption.__traceback__)
            raise
        else:
            # Not told of the block's own error, which is not one of a task of ours: it goes on as it is.
            await self._group.__aexit__(None, None, None)
        finally:
            await self._session.close()

    # -- what callers do ----------------------------------------------------------------------------------

    def start(self, config: Document, sink: Sink, *, timeout: float | None = None) -> Context:
        """Ask for a context and return at once; `sink` hears of it. Raises PoolClosed.

        What is sent to it before it exists is kept and follows its create.
        """
        if not self.is_open:
            state = "not open yet" if self.close_at is None else "closed or closing"
            raise PoolClosed(f"the Inworld pool is {state}")
        patience = self._acquire_timeout if timeout is None else timeout
        context = Context(self, config, sink, now() + patience)
        self._live += 1
        self.waiting[context] = now()
        context.start()
        return context

    async def acquire(self, config: Document, *, timeout: float | None = None) -> Stream:
        """Return a context that the server has created. Raises InworldError, within `timeout` seconds."""
        stream = Stream(self._max_unread)
        stream.context = self.start(config, stream, timeout=timeout)
        try:
            await stream.created()
        except BaseException:
            stream.cancel()
            raise
        return stream

    @asynccontextmanager
    async def context(self, config: Document, *, timeout: float | None = None) -> AsyncIterator[Stream]:
        """Acquire a context for a block; it is released after it, or cancelled when the block raises."""
        stream = await self.acquire(config, timeout=timeout)
        try:
            yield stream
        except BaseException:
            stream.cancel()
            raise
        await stream.release()

    def set_key(self, key: str) -> None:
        """Use another key for connections made from now on; what was refused may be tried at once."""
        self._key = key
        self._backoff.succeed()
        self._redial_at = 0.0
        self._settle()

    async def aclose(self, deadline: float | None = None) -> Census:
        """Close everything in order, by `deadline` at the latest, and say how that went.

        Safe to call again, concurrently (the earliest deadline holds), and to cancel: the close goes on.
        """
        at = now() + self.timings.aclose if deadline is None else deadline
        if self.close_at is None:
            self.close_at = at
            self.is_open = False
            closing.begin(self)
            self.changed.notify()
        self.hurry(at)
        return await asyncio.shield(self._census)

    def hurry(self, at: float) -> None:
        """Move the deadline of a close that is under way towards now."""
        if self.close_at is not None and at < self.close_at:
            self.close_at = at
            self.changed.notify()

    @property
    def figures(self) -> Figures:
        """What there is now, and what happened since the start."""
        return Figures(
            connections=len(self.slots.lines),
            dialling=len(self.slots.dialling),
            contexts=self.slots.taken,
            waiters=self.slots.waiters,
            **asdict(self._meter),
        )

    # -- what contexts ask ----------------------------------------------------------------------------------

    def enter(self, ticket: Ticket, *, first: bool) -> None:
        self.slots.enter(ticket, first=first)
        if ticket.hold is Hold.WAITING:
            self._meter.waited += 1
            self._settle()

    def keep(self, ticket: Ticket) -> Connection:
        assert ticket.line is not None
        self.slots.keep(ticket)
        return self.connections[ticket.line]

    def free(self, ticket: Ticket) -> None:
        self.slots.free(ticket)

    def granted(self, context: Context) -> None:
        asked_at = self.waiting.pop(context)
        self._meter.granted += 1
        self._meter.wait_seconds += now() - asked_at

    def retried(self, context: Context) -> None:
        self._meter.retries += 1
        self.waiting[context] = now()

    def adopted(self) -> None:
        self._live += 1

    def ended(self, context: Context, fate: Fate, *, had_place: bool) -> None:
        self._live -= 1
        if self.waiting.pop(context, None) is not None and not self.slots.waiters:
            self._stop_dialling()
        if self.close_at is not None and had_place:
            self.tally.contexts[fate] += 1
        if self.close_at is not None:
            self.changed.notify()

    # -- what connections report ----------------------------------------------------------------------------

    def retire(self, line: Line) -> None:
        self.slots.retire(line)
        connection = self.connections.get(line)
        if connection is not None and not connection.contexts:
            self._is_at_rest(connection)
        self._settle()

    def _is_at_rest(self, connection: Connection) -> None:
        """A connection has no context: close it if it is to take none, else remember to look later."""
        if connection.line.state is LineState.OPEN:
            self._alarm.set(connection.idle_since + min(self._idle_timeout, self.timings.warm))
        elif connection.line.state is LineState.RETIRED:
            self.end_line(connection.line)

    def end_line(self, line: Line) -> None:
        """Close a connection, or stop its dial."""
        connection = self.connections.get(line)
        self.slots.close(line)
        if connection is None:
            self.tasks[line].cancel()
        else:
            at = now() + self.timings.goodbye
            connection.close(at if self.close_at is None else min(at, self.close_at))

    # -- dials ----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Dial as many as those who wait need; see again when that may have changed."""
        if not self.is_open:
            return
        at = now()
        if self._redial_at > at:
            if self.slots.waiters:
                self._alarm.set(self._redial_at)
            return
        wanted = self.slots.wanted()
        if self._backoff.failures:
            # After a failure one dial finds out for all, or one more if that hangs.
            wanted = min(wanted, int(all(line.is_slow for line in self.slots.dialling)))
        for _ in range(wanted):
            self._dial()
        if self.slots.waiters:
            for line in self.slots.dialling:
                if not line.is_slow:
                    self._alarm.set(self._dialled_at[line] + self.timings.slow_dial)

    def _dial(self, *, is_probe: bool = False) -> None:
        line = self.slots.dial(is_probe=is_probe)
        self._dialled_at[line] = now()
        self.tasks[line] = task = self._group.create_task(self._live_of(line))
        # Not at the end of the coroutine: cancelled before its first step, it would never come there.
        task.add_done_callback(lambda _: self._gone(line))

    def _stop_dialling(self) -> None:
        """Nobody waits any more because they went away: what was dialled for them is not needed."""
        for line in self.slots.dialling:
            if not line.is_probe:
                self.end_line(line)

    async def _live_of(self, line: Line) -> None:
        """The whole life of one connection."""
        timings = self.timings
        try:
            ws = await dial(
                self._session, self.url, self._key, patience=timings.dial, goodbye=timings.goodbye
            )
        except DialError as error:
            self._dial_failed(line, error)
            return
        connection = Connection(line, ws, timings=timings, hooks=self._hooks)
        if line.state is LineState.DIALLING:
            self._backoff.succeed()
            self.connections[line] = connection
            self.slots.opened(line)
            connection.rest()
            if line.is_probe:
                self._alarm.set(now())
            self._settle()
        else:
            connection.close(now() + timings.goodbye)
        await connection.run()
        self._meter.lost += connection.was_lost

    def _gone(self, line: Line) -> None:
        connection = self.connections.pop(line, None)
        if connection is not None and self.close_at is not None:
            self.tally.connections[connection.fate] += 1
        del self._dialled_at[line], self.tasks[line]
        self.slots.gone(line)
        self.changed.notify()
        self._settle()

    def _dial_failed(self, line: Line, error: DialError) -> None:
        self._meter.failed_dials += 1
        self._meter.refusals += error.failure == "refused"
        log.warning("no connection", extra={"why": str(error), "connection": line.number})
        at = now()
        if self._dialled_at[line] >= self._redial_at:
            # Dials that were under way together fail together, and count once.
            self._redial_at = at + self._backoff.fail()
        if error.failure == "key" and not self.connections:
            for context in list(self.waiting):
                context.fail(KeyRefused(str(error)))

    # -- the alarm ------------------------------------------------------------------------------------------

    def _look(self) -> None:
        if not self.is_open:
            return
        at = now()
        for line in self.slots.dialling:
            if self._dialled_at[line] + self.timings.slow_dial <= at:
                line.is_slow = True
        self._look_at_idle(at)
        self._settle()

    def _look_at_idle(self, at: float) -> None:
        lines = self.slots.lines
        idle = [(self.connections[line].idle_since, line) for line in self.slots.idle]
        plan = idling.plan(
            idle,
            is_all=len(idle) == sum(line.state is LineState.OPEN for line in lines),
            at=at,
            timeout=self._idle_timeout,
            warm=self.timings.warm,
            has_room=len(lines) < self.slots.max_connections,
        )
        for line in plan.close:
            self.end_line(line)
        if plan.replace is not None:
            if not self.slots.dialling:
                self._dial(is_probe=True)
                plan.replace.was_used = False  # if the dial fails, the next look closes it
            self._alarm.set(at + self.timings.dial)
        self._alarm.set(plan.look_at)

    # -- the close ------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Wait for the close and carry it out; its caller may go away."""
        self._began = now()
        try:
            await self.changed.until(lambda: self.close_at is not None)
            self._began = now()
            await closing.carry_out(self, self._began)
        finally:
            self._alarm.stop()
            await self._session.close()

    def _take_census(self) -> None:
        if not self._census.done():
            self._census.set_result(
                self.tally.census(
                    connections=len(self.connections),
                    contexts=self._live,
                    tasks=len(self.tasks),
                    seconds=now() - self._began,
                )
            )
