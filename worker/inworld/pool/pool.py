"""The pool: contexts for whoever asks, on as few connections as they need.

`Capacity` decides which context has which place. A `Context` says what it wants done, a `Connection` has the
socket. The pool owns all of them, the tasks, and the clock. It dials while a context waits, no more
connections than the waiting contexts need. It closes what is idle, except one connection, and replaces that
one before the server would close it.

Tasks: one for each connection, which dials, serves and ends it, and one that waits for the close. All are in
one TaskGroup. A caller owns no task: when a caller is cancelled its context is cancelled, and no other.

The close, in order and on time:

    refuse new contexts, fail waiters, stop handshakes, cancel contexts     at once
    wait until the server has ended each context                            until contexts_at
    close each connection with code 1000, as soon as it has no context      until close_at
    take the sockets away from servers that do not answer                   at close_at
    join every task

The first line happens between two turns of the loop, so that no new context can slip in. `close_at` may move
towards now while the rest runs.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import assert_never

import aiohttp

from lastcall.worker.base.backoff import Backoff
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.inworld.pool import idling
from lastcall.worker.inworld.pool.capacity import Capacity, Claim, ClaimState, PoolEntry
from lastcall.worker.inworld.pool.close_report import CloseReport, CloseTally
from lastcall.worker.inworld.pool.connection import Callbacks, Connection
from lastcall.worker.inworld.pool.context import (
    Context,
    Deliver,
    Effects,
    End,
    Listener,
    Retire,
    Retry,
    Send,
    Tell,
    Watch,
)
from lastcall.worker.inworld.pool.dialling import DialError, dial
from lastcall.worker.inworld.pool.errors import InworldError, KeyRefused, PoolClosed
from lastcall.worker.inworld.pool.figures import Counters, Figures
from lastcall.worker.inworld.pool.lifecycles import ConnectionState
from lastcall.worker.inworld.pool.protocol import Action, Document
from lastcall.worker.inworld.pool.timer import Timer
from lastcall.worker.inworld.pool.timings import Timings

log = logging.getLogger("lastcall.inworld")

# What the closing handshakes get of a close: at most so many seconds, and at most this part of the whole.
# Ours: a handshake is one round trip, and a context that has to end needs the larger part of a short close.
MAX_HANDSHAKE_SECONDS = 1.0
HANDSHAKE_SHARE = 0.4
# Seconds to join tasks whose sockets are gone. Ours: they need a few turns of the loop, on a busy machine
# too.
JOIN_SECONDS = 0.25
# Part of each delay that is random. Ours: machines that Inworld refused together must not come back together.
REDIAL_JITTER = 0.5


@dataclass(slots=True)
class Waiting:
    """A context's wait for a place: since when, and the timer for its acquire timeout."""

    since: float
    timer: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class InworldPool:
    """Connections to one Inworld account; use as an async context manager.

    `key` is sent as given. `max_connections` limits the account, and `max_contexts` each connection.
    `idle_connection_timeout` and `acquire_timeout` are seconds. `seed`: for the back-off's random part.
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
        timings: Timings | None = None,
        proxy: str | None = None,
        seed: int | None = None,
    ) -> None:
        self.url = url
        self.timings = timings or Timings()
        self.capacity = Capacity(max_connections, max_contexts)
        self.connections: dict[PoolEntry, Connection] = {}
        self.tasks: dict[PoolEntry, asyncio.Task[None]] = {}
        self.is_open = False
        self._close_at: float | None = None
        self._key = key
        self._proxy = proxy
        self._idle_timeout = idle_connection_timeout
        self._acquire_timeout = acquire_timeout
        # Every context that has not ended, and what it has of the capacity.
        self._claims: dict[Context, Claim] = {}
        # Those of them that the server has not been asked for.
        self._waiting: dict[Context, Waiting] = {}
        self._backoff = Backoff(
            self.timings.retry_first,
            self.timings.retry_cap,
            jitter=REDIAL_JITTER,
            random=random.Random(seed),
        )
        self._redial_at = 0.0
        self._dialled_at: dict[PoolEntry, float] = {}
        self._callbacks = Callbacks(perform=self._perform, retire=self._retire, on_idle=self._on_idle)
        self._timer = Timer(self._on_timer)
        self._counters = Counters()
        self._tally = CloseTally()
        self._changed = Condition()
        self._close_began = 0.0
        self._group = asyncio.TaskGroup()
        self._report: asyncio.Future[CloseReport]
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> InworldPool:
        await self._group.__aenter__()
        # The pool keeps and limits the connections, so aiohttp must do neither.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, proxy=self._proxy)
        self._report = asyncio.get_running_loop().create_future()
        closing = self._group.create_task(self._close_when_asked())
        closing.add_done_callback(lambda _: self._finish_report())
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
            # The block's own error is no failure of a task in the group, which would wrap it.
            await self._group.__aexit__(None, None, None)
        finally:
            await self._session.close()

    # -- what callers do ----------------------------------------------------------------------------------

    def start(self, config: Document, listener: Listener, *, timeout: float | None = None) -> Context:
        """Ask for a context and return at once; the listener hears of it. Raises PoolClosed.

        Frames that are sent before the context exists are kept, and follow its create. `timeout`: seconds
        until the context has to exist, by default the pool's `acquire_timeout`.
        """
        if not self.is_open:
            state = "not open yet" if self._close_at is None else "closed or closing"
            raise PoolClosed(f"the Inworld pool is {state}")
        patience = self._acquire_timeout if timeout is None else timeout
        context = Context(config, listener, timings=self.timings, acquire_at=now() + patience)
        self._request(context, first=False)
        return context

    def send(self, context: Context, action: Action, document: Document) -> None:
        """Pass a frame on, after those before it. A context that is closed or has ended ignores the frame."""
        self._perform(context, context.send(action, document, now()))

    def close(self, context: Context) -> None:
        """Have the server finish what it has, and close the context."""
        self._perform(context, context.close(now()))

    def cancel(self, context: Context) -> None:
        """Stop a context at once. Its place comes free when the server says so."""
        self._perform(context, context.cancel(now()))

    def fail(self, context: Context, error: InworldError) -> None:
        """Tell the listener this error as the end, now, and cancel the context at the server."""
        self._perform(context, context.fail(error, now()))

    async def room(self, context: Context) -> None:
        """Wait until the context's connection, if there is one, takes more. Raises ConnectionLost."""
        claim = self._claims.get(context)
        if claim is not None and claim.entry is not None:
            await self.connections[claim.entry].room()

    def set_key(self, key: str) -> None:
        """Use another key for new connections. A refused handshake may be tried again at once."""
        self._key = key
        self._backoff.succeed()
        self._redial_at = 0.0
        self._dial_as_wanted()

    async def aclose(self, deadline: float | None = None) -> CloseReport:
        """Close everything in order, by `deadline` at the latest, and say how that went.

        Safe to call again, concurrently (the earliest deadline holds), and to cancel: the close goes on.
        """
        at = now() + self.timings.aclose if deadline is None else deadline
        if self._close_at is None:
            self._close_at = at
            self.is_open = False
            self._begin_close()
            self._changed.notify()
        self.hurry(at)
        return await asyncio.shield(self._report)

    def hurry(self, at: float) -> None:
        """Move the deadline of a close that is under way towards now."""
        if self._close_at is not None and at < self._close_at:
            self._close_at = at
            self._changed.notify()

    def close_entry(self, entry: PoolEntry) -> None:
        """Close one connection, or stop its handshake."""
        connection = self.connections.get(entry)
        self.capacity.close(entry)
        if connection is None:
            self.tasks[entry].cancel()
        else:
            at = now() + self.timings.close_handshake
            connection.close(at if self._close_at is None else min(at, self._close_at))

    @property
    def figures(self) -> Figures:
        """What there is now, and what happened since the start."""
        return Figures(
            connections=len(self.capacity.entries),
            dialling=len(self.capacity.dialling),
            contexts=self.capacity.taken,
            waiters=self.capacity.waiters,
            **asdict(self._counters),
        )

    # -- what contexts want done ----------------------------------------------------------------------------

    def _perform(self, context: Context, effects: Effects) -> None:
        for effect in effects:
            match effect:
                case Deliver(frame):
                    assert context.listener is not None
                    context.listener.on_frame(frame, context)
                case Send(text):
                    self._connection_of(context).put(text)
                case Watch(at):
                    self._connection_of(context).watch(at)
                case Tell(error, frame):
                    # Drop the listener: it refers to this context, and the reference cycle would keep both
                    # alive until the next garbage collection.
                    listener, context.listener = context.listener, None
                    assert listener is not None
                    listener.on_end(error, frame, context)
                case Retire():
                    self._retire(self._connection_of(context).entry)
                case Retry(remainder):
                    self._retry(context, remainder)
                case End(fate):
                    self._end(context, fate)
                case _:
                    assert_never(effect)

    def _connection_of(self, context: Context) -> Connection:
        entry = self._claims[context].entry
        assert entry is not None
        return self.connections[entry]

    def _request(self, context: Context, *, first: bool) -> None:
        self._claims[context] = claim = Claim(lambda _: self._granted(context))
        self._waiting[context] = waiting = Waiting(now())
        self.capacity.request(claim, first=first)
        if claim.state is ClaimState.WAITING:
            self._counters.waited += 1
            left = max(0.0, context.acquire_at - now())
            waiting.timer = asyncio.get_running_loop().call_later(left, self._expire, context)
            self._dial_as_wanted()

    def _expire(self, context: Context) -> None:
        self._perform(context, context.expire(now()))

    def _granted(self, context: Context) -> None:
        waiting = self._waiting.pop(context)
        waiting.stop()
        self._counters.granted += 1
        self._counters.wait_seconds += now() - waiting.since
        self.capacity.create_sent(self._claims[context])
        # A hyphen is no letter of base64, so the id can't stand in any audio.
        id = f"lc-{secrets.token_hex(8)}"
        self._connection_of(context).contexts[id] = context
        self._perform(context, context.granted(id, now()))

    def _retry(self, context: Context, remainder: Context | None) -> None:
        self._counters.retries += 1
        claim = self._claims[context]
        if remainder is None:
            self._connection_of(context).contexts.pop(context.id)
            self.capacity.release(claim)
        else:
            self._claims[remainder] = claim
            self._connection_of(remainder).contexts[remainder.id] = remainder
            self.cancel(remainder)
        self._request(context, first=True)

    def _end(self, context: Context, fate: str) -> None:
        claim = self._claims.pop(context)
        connection = None if claim.entry is None else self.connections[claim.entry]
        if connection is not None:
            connection.contexts.pop(context.id)
        self.capacity.release(claim)
        waiting = self._waiting.pop(context, None)
        if waiting is not None:
            waiting.stop()
            if not self.capacity.waiters:
                self._stop_dialling()
        if self._close_at is not None:
            if connection is not None:
                self._tally.contexts[fate] += 1
            self._changed.notify()
        if connection is not None:
            connection.report_idle()

    # -- what connections report ----------------------------------------------------------------------------

    def _retire(self, entry: PoolEntry) -> None:
        self.capacity.retire(entry)
        connection = self.connections.get(entry)
        if connection is not None and not connection.contexts:
            self._on_idle(connection)
        self._dial_as_wanted()

    def _on_idle(self, connection: Connection) -> None:
        """Close a connection that takes no new context; look at any other again after its idle time."""
        if connection.entry.state is ConnectionState.OPEN:
            self._timer.set(connection.idle_since + min(self._idle_timeout, self.timings.warm))
        elif connection.entry.state is ConnectionState.RETIRED:
            self.close_entry(connection.entry)

    # -- handshakes -----------------------------------------------------------------------------------------

    def _dial_as_wanted(self) -> None:
        """Dial as many connections as the waiting contexts need; look again when that may have changed."""
        if not self.is_open:
            return
        at = now()
        if self._redial_at > at:
            if self.capacity.waiters:
                self._timer.set(self._redial_at)
            return
        wanted = self.capacity.wanted()
        if self._backoff.failures:
            # After a failure one handshake finds out for all, or one more if that one hangs.
            wanted = min(wanted, int(all(entry.is_slow for entry in self.capacity.dialling)))
        for _ in range(wanted):
            self._dial()
        if self.capacity.waiters:
            for entry in self.capacity.dialling:
                if not entry.is_slow:
                    self._timer.set(self._dialled_at[entry] + self.timings.slow_dial)

    def _dial(self, *, is_replacement: bool = False) -> None:
        entry = self.capacity.dial(is_replacement=is_replacement)
        self._dialled_at[entry] = now()
        self.tasks[entry] = task = self._group.create_task(self._live(entry))
        # Not at the end of the coroutine: a task that is cancelled before its first step never gets there.
        task.add_done_callback(lambda _: self._gone(entry))

    def _stop_dialling(self) -> None:
        """Stop the handshakes that were begun for contexts which wait no more."""
        for entry in self.capacity.dialling:
            if not entry.is_replacement:
                self.close_entry(entry)

    async def _live(self, entry: PoolEntry) -> None:
        """The whole life of one connection."""
        timings = self.timings
        try:
            ws = await dial(
                self._session,
                self.url,
                self._key,
                timeout=timings.dial,
                close_timeout=timings.close_handshake,
            )
        except DialError as error:
            self._dial_failed(entry, error)
            return
        connection = Connection(entry, ws, timings=timings, callbacks=self._callbacks)
        if entry.state is ConnectionState.DIALLING:
            self._backoff.succeed()
            self.connections[entry] = connection
            self.capacity.opened(entry)
            connection.report_idle()
            if entry.is_replacement:
                self._timer.set(now())
            self._dial_as_wanted()
        else:
            connection.close(now() + timings.close_handshake)
        await connection.run()
        self._counters.lost += connection.was_lost

    def _gone(self, entry: PoolEntry) -> None:
        connection = self.connections.pop(entry, None)
        if connection is not None and self._close_at is not None:
            self._tally.connections[connection.fate] += 1
        del self._dialled_at[entry], self.tasks[entry]
        self.capacity.gone(entry)
        self._changed.notify()
        self._dial_as_wanted()

    def _dial_failed(self, entry: PoolEntry, error: DialError) -> None:
        self._counters.failed_dials += 1
        self._counters.refusals += error.failure == "refused"
        log.warning("no connection", extra={"why": str(error), "connection": entry.number})
        at = now()
        if self._dialled_at[entry] >= self._redial_at:
            # Handshakes that were under way together fail together, and count once.
            self._redial_at = at + self._backoff.fail()
        if error.failure == "key" and not self.connections:
            for context in list(self._waiting):
                self.fail(context, KeyRefused(str(error)))

    # -- the timer ------------------------------------------------------------------------------------------

    def _on_timer(self) -> None:
        if not self.is_open:
            return
        at = now()
        for entry in self.capacity.dialling:
            if self._dialled_at[entry] + self.timings.slow_dial <= at:
                entry.is_slow = True
        self._close_idle(at)
        self._dial_as_wanted()

    def _close_idle(self, at: float) -> None:
        entries = self.capacity.entries
        idle = [(self.connections[entry].idle_since, entry) for entry in self.capacity.idle]
        plan = idling.plan(
            idle,
            is_all=len(idle) == sum(entry.state is ConnectionState.OPEN for entry in entries),
            at=at,
            timeout=self._idle_timeout,
            warm=self.timings.warm,
            has_room=len(entries) < self.capacity.max_connections,
        )
        for entry in plan.close:
            self.close_entry(entry)
        if plan.replace is not None:
            if not self.capacity.dialling:
                self._dial(is_replacement=True)
                plan.replace.was_used = False  # if the handshake fails, the next look closes this one
            self._timer.set(at + self.timings.dial)
        self._timer.set(plan.look_at)

    # -- the close ------------------------------------------------------------------------------------------

    def _begin_close(self) -> None:
        """Let nothing new begin, and ask everything to end."""
        closing = PoolClosed("the Inworld pool is closing")
        for context in list(self._waiting):
            self.fail(context, closing)
        for entry in list(self.capacity.entries):
            connection = self.connections.get(entry)
            if connection is None:
                self.close_entry(entry)
                continue
            for context in list(connection.contexts.values()):
                self.fail(context, closing)
            self._retire(entry)

    async def _close_when_asked(self) -> None:
        """Wait for the close and carry it out; the caller of `aclose` may go away."""
        self._close_began = now()
        try:
            await self._changed.until(lambda: self._close_at is not None)
            self._close_began = now()
            await self._carry_out_close()
        finally:
            self._timer.stop()
            await self._session.close()

    async def _carry_out_close(self) -> None:
        """Afterwards no task of a connection is left, or the report says so."""

        def close_at() -> float:
            assert self._close_at is not None
            return self._close_at

        def contexts_at() -> float:
            left = max(0.0, close_at() - self._close_began)
            return close_at() - min(MAX_HANDSHAKE_SECONDS, HANDSHAKE_SHARE * left)

        await self._changed.until(lambda: not self.tasks or not self._open_contexts(), contexts_at)
        for connection in list(self.connections.values()):
            self.capacity.close(connection.entry)
            connection.close(close_at())
        await self._changed.until(lambda: not self.tasks, close_at)
        for connection in list(self.connections.values()):
            connection.close(close_at())  # it may have moved
        for task in list(self.tasks.values()):
            task.cancel()
        if self.tasks:
            await asyncio.wait(list(self.tasks.values()), timeout=JOIN_SECONDS)

    def _open_contexts(self) -> int:
        return sum(len(connection.contexts) for connection in self.connections.values())

    def _finish_report(self) -> None:
        if not self._report.done():
            self._report.set_result(
                self._tally.report(
                    connections=len(self.connections),
                    contexts=len(self._claims),
                    tasks=len(self.tasks),
                    seconds=now() - self._close_began,
                )
            )
