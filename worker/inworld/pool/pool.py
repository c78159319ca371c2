"""The pool: contexts for all callers, on as few connections as the contexts need.

`Capacity` decides which context has which place. A `Context` says what it wants done, and `Contexts` does
that. A `Connection` has the socket, and `Connections` decides how many there are. The pool owns all of them,
has the methods that callers use, and closes everything in order.

Tasks: one for each connection, and one that waits for the close. All are in one TaskGroup. A caller owns no
task. The group would cancel every task when one of them fails, so an exception that nobody foresaw ends where
it was raised: in the dial, the connection or the context (`fault_log`).

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
from dataclasses import asdict
from types import TracebackType

import aiohttp

from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.inworld.pool.capacity import Capacity
from lastcall.worker.inworld.pool.close_report import CloseReport, CloseTally
from lastcall.worker.inworld.pool.context import Context, Listener
from lastcall.worker.inworld.pool.errors import InworldError, PoolClosed
from lastcall.worker.inworld.pool.fault_log import FaultLog
from lastcall.worker.inworld.pool.figures import Counters, Figures
from lastcall.worker.inworld.pool.live_contexts import Contexts
from lastcall.worker.inworld.pool.open_connections import Connections
from lastcall.worker.inworld.pool.protocol import Action, Document
from lastcall.worker.inworld.pool.timings import Timings

# The part of a close for the closing handshakes, in seconds and as a share of the whole. The smaller one
# holds. Ours: a handshake is one round trip, and a context that has to end needs the larger part of a short
# close.
MAX_HANDSHAKE_SECONDS = 1.0
HANDSHAKE_SHARE = 0.4
# Seconds for the tasks to end once their sockets are closed. Ours: a task needs a few turns of the loop for
# that, and turns are slow on a busy machine.
JOIN_SECONDS = 0.25


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
        self.timings = timings or Timings()
        self.capacity = Capacity(max_connections, max_contexts)
        self._acquire_timeout = acquire_timeout
        self._proxy = proxy
        self._counters = Counters()
        self.faults = FaultLog()
        self._tally = CloseTally()
        self._changed = Condition()
        self._close_at: float | None = None
        self._close_began = 0.0
        self._connections = Connections(
            url,
            key,
            capacity=self.capacity,
            timings=self.timings,
            idle_timeout=idle_connection_timeout,
            seed=seed,
            counters=self._counters,
            faults=self.faults,
            tally=self._tally,
            changed=self._changed,
        )
        self._contexts = Contexts(
            self.capacity,
            self._connections,
            timings=self.timings,
            counters=self._counters,
            faults=self.faults,
            tally=self._tally,
            changed=self._changed,
        )
        self.connections = self._connections.by_entry
        self.tasks = self._connections.tasks
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
        self._connections.open(
            self._group,
            self._session,
            act=self._contexts.act,
            fail_waiting=self._contexts.fail_waiting,
            on_open=self._contexts.try_slow_elsewhere,
        )
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
        """Ask for a context and return at once; the listener gets its frames and its end. Raises PoolClosed.

        Frames that are sent before the context exists are kept, and follow its create. `timeout`: seconds
        until the context has to exist, by default the pool's `acquire_timeout`.
        """
        if not self._connections.is_open:
            state = "not open yet" if self._close_at is None else "closed or closing"
            raise PoolClosed(f"the Inworld pool is {state}")
        patience = self._acquire_timeout if timeout is None else timeout
        context = Context(config, listener, timings=self.timings, acquire_at=now() + patience)
        try:
            self._contexts.request(context)
        except Exception as error:
            self._contexts.end_faulty(context, error)
        return context

    def send(self, context: Context, action: Action, document: Document) -> None:
        """Pass a frame on, after those before it. A context that is closed or has ended ignores the frame."""
        self._contexts.act(context, context.send, action, document, now())

    def close(self, context: Context) -> None:
        """Have the server finish what it has, and close the context."""
        self._contexts.act(context, context.close, now())

    def cancel(self, context: Context) -> None:
        """Stop a context at once. Its place comes free when the server says so."""
        self._contexts.act(context, context.cancel, now())

    def fail(self, context: Context, error: InworldError) -> None:
        """Tell the listener this error as the end, now, and cancel the context at the server."""
        self._contexts.fail(context, error)

    async def room(self, context: Context) -> None:
        """Wait until the context's connection, if there is one, takes more. Raises ConnectionLost."""
        connection = self._contexts.connection_of(context)
        if connection is not None:
            await connection.room()

    def set_key(self, key: str) -> None:
        """Use another key for new connections. A refused handshake may be tried again at once."""
        self._connections.set_key(key)

    async def aclose(self, deadline: float | None = None) -> CloseReport:
        """Close everything in order, by `deadline` at the latest, and say how that went.

        Safe to call again, concurrently (the earliest deadline holds), and to cancel: the close goes on.
        """
        at = now() + self.timings.aclose if deadline is None else deadline
        if self._close_at is None:
            self._close_at = self._connections.close_by = at
            self._tally.is_counting = True
            self._connections.is_open = False
            self._begin_close()
            self._changed.notify()
        self.hurry(at)
        return await asyncio.shield(self._report)

    def hurry(self, at: float) -> None:
        """Move the deadline of a close that is under way towards now."""
        if self._close_at is not None and at < self._close_at:
            self._close_at = self._connections.close_by = at
            self._changed.notify()

    @property
    def figures(self) -> Figures:
        """The numbers of now, and the counters since the start."""
        return Figures(
            connections=len(self.capacity.entries),
            dialling=len(self.capacity.dialling),
            contexts=self.capacity.taken,
            waiters=self.capacity.waiters,
            faults=self.faults.count,
            **asdict(self._counters),
        )

    # -- the close ------------------------------------------------------------------------------------------

    def _begin_close(self) -> None:
        """Let nothing new begin, and ask everything to end."""
        closing = PoolClosed("the Inworld pool is closing")
        self._contexts.fail_waiting(closing)
        for entry in list(self.capacity.entries):
            connection = self.connections.get(entry)
            if connection is None:
                self._connections.close(entry)
                continue
            for context in list(connection.contexts.values()):
                self._contexts.fail(context, closing)
            self._connections.retire(entry)

    async def _close_when_asked(self) -> None:
        """Wait for the close and carry it out; the caller of `aclose` may go away."""
        self._close_began = now()
        try:
            await self._changed.until(lambda: self._close_at is not None)
            self._close_began = now()
            await self._carry_out_close()
        finally:
            self._connections.stop()
            await self._session.close()

    async def _carry_out_close(self) -> None:
        """Afterwards no task of a connection is left, or the report says so."""

        def close_at() -> float:
            assert self._close_at is not None
            return self._close_at

        def contexts_at() -> float:
            left = max(0.0, close_at() - self._close_began)
            return close_at() - min(MAX_HANDSHAKE_SECONDS, HANDSHAKE_SHARE * left)

        await self._changed.until(lambda: not self.tasks or not self._contexts.open, contexts_at)
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

    def _finish_report(self) -> None:
        if not self._report.done():
            self._report.set_result(
                self._tally.report(
                    connections=len(self.connections),
                    contexts=len(self._contexts.claims),
                    tasks=len(self.tasks),
                    seconds=now() - self._close_began,
                )
            )
