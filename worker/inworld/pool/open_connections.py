"""The connections of a pool: handshakes as contexts need them, a task for each, the end of what is idle.

Connections are dialled while a context waits, no more of them than the waiting contexts need. Idle ones are
closed, except one, and that one is replaced before the server would close it. The task of a connection
dials, serves and ends it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

import aiohttp

from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.inworld.pool import idling
from lastcall.worker.inworld.pool.capacity import Capacity, PoolEntry
from lastcall.worker.inworld.pool.close_report import CloseTally
from lastcall.worker.inworld.pool.connection import Act, Callbacks, Connection
from lastcall.worker.inworld.pool.dialling import DialError, dial
from lastcall.worker.inworld.pool.errors import InworldError, LastcallFault
from lastcall.worker.inworld.pool.fault_log import FaultLog
from lastcall.worker.inworld.pool.figures import Counters
from lastcall.worker.inworld.pool.lifecycles import ConnectionState
from lastcall.worker.inworld.pool.redialling import Redialling
from lastcall.worker.inworld.pool.timer import NEVER, Timer
from lastcall.worker.inworld.pool.timings import Timings

log = logging.getLogger("lastcall.inworld")


class Connections:
    """The connections to one account, by entry.

    `is_open`: handshakes may begin. `close_by`: when every connection has to be closed.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        capacity: Capacity,
        timings: Timings,
        idle_timeout: float,
        seed: int | None,
        counters: Counters,
        faults: FaultLog,
        tally: CloseTally,
        changed: Condition,
    ) -> None:
        self.url = url
        self.by_entry: dict[PoolEntry, Connection] = {}
        self.tasks: dict[PoolEntry, asyncio.Task[None]] = {}
        self.is_open = False
        self.close_by = NEVER
        self._key = key
        self._capacity = capacity
        self._timings = timings
        self._idle_timeout = idle_timeout
        self._counters = counters
        self._faults = faults
        self._tally = tally
        self._changed = changed
        self._redialling = Redialling(timings, random.Random(seed))
        self._dialled_at: dict[PoolEntry, float] = {}
        # Open connections that have yet to stand for `Timings.settle`.
        self._unsettled: list[Connection] = []
        self._timer = Timer(self._on_timer)
        self._callbacks: Callbacks
        self._fail_waiting: Callable[[InworldError], None]
        self._on_open: Callable[[], None]
        self._group: asyncio.TaskGroup
        self._session: aiohttp.ClientSession

    def open(
        self,
        group: asyncio.TaskGroup,
        session: aiohttp.ClientSession,
        *,
        act: Act,
        fail_waiting: Callable[[InworldError], None],
        on_open: Callable[[], None],
    ) -> None:
        """Let handshakes begin; the tasks of connections are the group's.

        `act` calls a method of a context and performs the effects. `fail_waiting` gets an error for every
        context that waits. `on_open` is called when another connection is open.
        """
        self._group, self._session = group, session
        self._callbacks = Callbacks(
            act=act, retire=self.retire, on_leave=self._on_leave, on_idle=self._on_idle
        )
        self._fail_waiting, self._on_open = fail_waiting, on_open
        self.is_open = True

    def stop(self) -> None:
        """Set no timer any more."""
        self._timer.stop()

    def set_key(self, key: str) -> None:
        """Use another key for new connections. A refused handshake may be tried again at once."""
        self._key = key
        self._redialling.reset()
        self.dial_as_wanted()

    @property
    def is_unanswered(self) -> bool:
        """Whether handshakes are under way, no connection stands, and the account is not known to be full."""
        return len(self._capacity.dialling) == len(self._capacity.entries) and not self._redialling.is_full

    def close(self, entry: PoolEntry) -> None:
        """Close one connection, or stop its handshake."""
        connection = self.by_entry.get(entry)
        self._capacity.close(entry)
        if connection is None:
            self.tasks[entry].cancel()
        else:
            connection.close(min(now() + self._timings.close_handshake, self.close_by))

    # -- what connections report ----------------------------------------------------------------------------

    def retire(self, entry: PoolEntry) -> None:
        """Put no new context on a connection, and close it once it has none."""
        self._capacity.retire(entry)
        connection = self.by_entry.get(entry)
        if connection is not None and not connection.contexts:
            self._on_idle(connection)
        self.dial_as_wanted()

    def _on_leave(self, connection: Connection, reason: str) -> None:
        """Retire a connection that ends; if the server has said nothing, its handshake failed."""
        began = self._dialled_at[connection.entry]
        if connection.heard_at == connection.opened_at and now() - began <= self._timings.dial:
            self._fail_dial(connection.entry, DialError(f"ended after the handshake, {reason}", "failed"))
        self.retire(connection.entry)

    def retire_silent(self, connection: Connection, since: float) -> None:
        """Retire every idle connection that was silent since then, if this one was.

        The network has probably forgotten them all at once, and the next create would meet the next of them.
        """
        if connection.heard_at <= since:
            for entry in self._capacity.idle:
                if self.by_entry[entry].heard_at <= since:
                    self.retire(entry)

    def has_room_beside(self, connection: Connection, since: float) -> bool:
        """Whether a connection that `retire_silent` leaves has a free place, and no context waits for it."""
        is_silent = connection.heard_at <= since
        return not self._capacity.waiters and any(
            entry.taken or not is_silent or self.by_entry[entry].heard_at > since
            for entry in self._capacity.free
            if entry is not connection.entry
        )

    def _on_idle(self, connection: Connection) -> None:
        """Close a connection that takes no new context; look at any other again after its idle time."""
        if connection.entry.state is ConnectionState.OPEN:
            self._timer.set(connection.idle_since + min(self._idle_timeout, self._timings.warm))
        elif connection.entry.state is ConnectionState.RETIRED:
            self.close(connection.entry)

    # -- handshakes -----------------------------------------------------------------------------------------

    def dial_as_wanted(self) -> None:
        """Dial as many connections as the waiting contexts need; look again when that may have changed."""
        if not self.is_open:
            return
        at = now()
        self._redialling.forget_stale(at)
        if not self._capacity.waiters:
            return
        if self._redialling.at > at:
            self._timer.set(self._redialling.at)
            self._look_at_dialling()
            return
        wanted = self._capacity.wanted()
        if self._redialling.has_failed:
            # One handshake finds out for all, or one more if that one hangs.
            is_finding_out = self._unsettled or not all(entry.is_slow for entry in self._capacity.dialling)
            wanted = min(wanted, int(not is_finding_out))
        for _ in range(wanted):
            self._redialling.began(at)
            self._dial()
        self._look_at_dialling()

    def _look_at_dialling(self) -> None:
        """Look again when a handshake becomes slow, and tell the contexts that wait of an outage."""
        for entry in self._capacity.dialling:
            if not entry.is_slow:
                self._timer.set(self._dialled_at[entry] + self._timings.slow_dial)
        self._tell_outage()

    def _tell_outage(self) -> None:
        """Fail every context that waits, if the server is known to be down and nothing is in sight."""
        if self._redialling.outage is None:
            return
        refusal = self._redialling.refusal(
            is_finding_out=bool(self._unsettled)
            or not all(entry.is_slow for entry in self._capacity.dialling),
            stands=any(entry.state is ConnectionState.OPEN for entry in self._capacity.entries),
        )
        if refusal is not None:
            self._fail_waiting(refusal)

    def _dial(self, *, is_replacement: bool = False) -> None:
        entry = self._capacity.dial(is_replacement=is_replacement)
        self._dialled_at[entry] = now()
        self.tasks[entry] = task = self._group.create_task(self._live(entry))
        # Not at the end of the coroutine: a task that is cancelled before its first step never gets there.
        task.add_done_callback(lambda _: self._gone(entry))

    def dial_beside(self) -> None:
        """Dial one more connection for a slow create, if that is sensible; the create itself goes on."""
        has_room = len(self._capacity.entries) < self._capacity.max_connections
        if self.is_open and has_room and not self._capacity.dialling and not self._redialling.has_failed:
            self._dial(is_replacement=True)

    def stop_dialling(self) -> None:
        """Stop the handshakes that were begun for contexts which wait no more.

        In an outage a handshake goes on, to find out when the outage is over.
        """
        if self._redialling.outage is not None and self.is_open:
            return
        for entry in self._capacity.dialling:
            if not entry.is_replacement:
                self.close(entry)

    async def _live(self, entry: PoolEntry) -> None:
        """Dial, serve and end one connection. An exception that left this task would end all others."""
        timings, key = self._timings, self._key
        try:
            ws = await dial(
                self._session,
                self.url,
                key,
                timeout=timings.dial,
                close_timeout=timings.close_handshake,
            )
        except DialError as error:
            self._fail_dial(entry, error, is_key_old=key != self._key)
            return
        except Exception as error:
            self._faults.note("a handshake", error, connection=entry.number)
            self._fail_dial(entry, DialError(str(LastcallFault(error)), "failed"))
            return
        try:
            await self._serve(entry, ws)
        except Exception as error:
            self._faults.note("a connection", error, connection=entry.number)

    async def _serve(self, entry: PoolEntry, ws: aiohttp.ClientWebSocketResponse) -> None:
        connection = Connection(entry, ws, timings=self._timings, callbacks=self._callbacks)
        try:
            self._opened(entry, connection)
        except Exception as error:
            self._faults.note("a connection", error, connection=entry.number)
            connection.close(now())  # and not left: the run below closes the socket
        try:
            await connection.run()
        finally:
            self._counters.lost += connection.was_lost

    def _opened(self, entry: PoolEntry, connection: Connection) -> None:
        if entry.state is not ConnectionState.DIALLING:
            connection.close(now() + self._timings.close_handshake)
            return
        self.by_entry[entry] = connection
        if self._redialling.outage is None:
            self._redialling.succeeded()
        else:
            self._unsettled.append(connection)
            self._timer.set(connection.opened_at + self._timings.settle)
        self._capacity.opened(entry)
        connection.report_idle()
        if entry.is_replacement:
            self._timer.set(now())
        self.dial_as_wanted()
        self._on_open()

    def _gone(self, entry: PoolEntry) -> None:
        connection = self.by_entry.pop(entry, None)
        self._unsettled = [each for each in self._unsettled if each is not connection]
        if connection is not None and self._tally.is_counting:
            self._tally.connections[connection.fate] += 1
        del self._dialled_at[entry], self.tasks[entry]
        self._capacity.gone(entry)
        self._changed.notify()
        self._tell_outage()
        self.dial_as_wanted()

    def _fail_dial(self, entry: PoolEntry, error: DialError, *, is_key_old: bool = False) -> None:
        self._counters.failed_dials += 1
        self._counters.refusals += error.failure == "refused"
        log.warning("no connection", extra={"why": str(error), "connection": entry.number})
        if is_key_old and error.failure == "key":
            return  # it says nothing of the present key, and the end of this task dials again
        self._redialling.failed(error, began=self._dialled_at[entry], at=now())

    # -- the timer ------------------------------------------------------------------------------------------

    def _on_timer(self) -> None:
        if not self.is_open:
            return
        at = now()
        for entry in self._capacity.dialling:
            if self._dialled_at[entry] + self._timings.slow_dial <= at:
                entry.is_slow = True
        self._settle(at)
        self._close_idle(at)
        self._tell_outage()
        self.dial_as_wanted()

    def _settle(self, at: float) -> None:
        """End the outage once a connection stands."""
        for connection in list(self._unsettled):
            settled_at = connection.opened_at + self._timings.settle
            if settled_at > at:
                self._timer.set(settled_at)
                continue
            self._unsettled.remove(connection)
            if connection.entry.state is ConnectionState.OPEN:
                self._redialling.succeeded()

    def _close_idle(self, at: float) -> None:
        entries = self._capacity.entries
        idle = [(self.by_entry[entry].idle_since, entry) for entry in self._capacity.idle]
        plan = idling.plan(
            idle,
            is_all=len(idle) == sum(entry.state is ConnectionState.OPEN for entry in entries),
            at=at,
            timeout=self._idle_timeout,
            warm=self._timings.warm,
            has_room=len(entries) < self._capacity.max_connections,
        )
        for entry in plan.close:
            self.close(entry)
        if plan.replace is not None:
            if not self._capacity.dialling:
                self._dial(is_replacement=True)
                plan.replace.was_used = False  # if the handshake fails, the next look closes this one
            self._timer.set(at + self._timings.dial)
        self._timer.set(plan.look_at)
