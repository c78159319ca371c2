"""The contexts of a pool: each context's claim on the capacity, its wait, and what it wants done.

A `Context` decides and returns effects. `Contexts` performs them: frames go to the context's connection or to
the listener, a claim is requested or released, and a context that has ended is forgotten. A caller owns no
task: when a caller is cancelled its context is cancelled, and no other.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVarTuple, assert_never

from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.inworld.pool.capacity import Capacity, Claim, ClaimState
from lastcall.worker.inworld.pool.close_report import CloseTally
from lastcall.worker.inworld.pool.connection import Connection
from lastcall.worker.inworld.pool.context import (
    Answered,
    Context,
    Deliver,
    Effect,
    Effects,
    End,
    Retire,
    Retry,
    Send,
    Slow,
    Tell,
    Watch,
)
from lastcall.worker.inworld.pool.errors import AcquireTimeout, InworldError, LastcallFault
from lastcall.worker.inworld.pool.fault_log import FaultLog
from lastcall.worker.inworld.pool.figures import Counters
from lastcall.worker.inworld.pool.lifecycles import ContextState
from lastcall.worker.inworld.pool.open_connections import Connections
from lastcall.worker.inworld.pool.second_tries import SecondTries
from lastcall.worker.inworld.pool.timings import Timings

Ts = TypeVarTuple("Ts")


@dataclass(slots=True)
class Waiting:
    """A context's wait for a place: since when, and the timer for its acquire timeout."""

    since: float
    timer: asyncio.TimerHandle


class Contexts:
    """Every context that has not ended, with its claim. `changed` is notified when one ends in a close."""

    def __init__(
        self,
        capacity: Capacity,
        connections: Connections,
        *,
        timings: Timings,
        counters: Counters,
        faults: FaultLog,
        tally: CloseTally,
        changed: Condition,
    ) -> None:
        self.claims: dict[Context, Claim] = {}
        # Those contexts that the server has not been asked for.
        self.waiting: dict[Context, Waiting] = {}
        self._capacity = capacity
        self._connections = connections
        self._counters = counters
        self._faults = faults
        self._second_tries = SecondTries(
            first=timings.second_try_first, least=timings.second_try_least, most=timings.create
        )
        self._tally = tally
        self._changed = changed

    @property
    def open(self) -> int:
        """How many contexts the server may count."""
        return sum(len(connection.contexts) for connection in self._connections.by_entry.values())

    def connection_of(self, context: Context) -> Connection | None:
        """Return the connection that the context has a place on, if any."""
        claim = self.claims.get(context)
        if claim is None or claim.entry is None:
            return None
        return self._connections.by_entry[claim.entry]

    def fail(self, context: Context, error: InworldError) -> None:
        """Tell the listener this error as the end, now, and cancel the context at the server."""
        self.act(context, context.fail, error, now())

    def fail_waiting(self, error: InworldError) -> None:
        """Fail every context that waits for a place."""
        for context in list(self.waiting):
            self.fail(context, error)

    def act(self, context: Context, method: Callable[[*Ts], Effects], *args: *Ts) -> None:
        """Call a method of the context and perform its effects in order. A fault ends this context alone."""
        try:
            for effect in method(*args):
                self._perform(context, effect)
        except Exception as error:
            self.end_faulty(context, error)

    def _perform(self, context: Context, effect: Effect) -> None:
        # The frequent ones first. The patterns bind nothing, because binding costs more than the attribute.
        match effect:
            case Send():
                self._connection_of(context).put(effect.text)
            case Watch():
                self._connection_of(context).watch(effect.at)
            case Deliver():
                assert context.listener is not None
                context.listener.on_frame(effect.frame, context)
            case End():
                self._end(context, effect.fate)
            case Answered():
                connection = self._connection_of(context)
                connection.create_seconds, connection.created_at = effect.seconds, now()
                self._second_tries.created(effect.seconds)
            case Tell():
                # Drop the listener: it refers to this context, and the reference cycle would keep both
                # alive until the next garbage collection.
                listener, context.listener = context.listener, None
                assert listener is not None
                try:
                    listener.on_end(effect.error, effect.frame, context)
                except Exception as fault:  # the effects after this one are the server's
                    self._faults.note("a listener", fault)
            case Slow():
                # After a pause of this process the answer may have come and not been read: frames first.
                asyncio.get_running_loop().call_soon(self._try_elsewhere, context)
            case Retire():
                self._connections.retire(self._connection_of(context).entry)
            case Retry():
                self._retry(context, effect.remainder)
            case _:
                assert_never(effect)

    def end_faulty(self, context: Context, error: Exception) -> None:
        """Fail a context after an exception that nobody foresaw, or forget it if that fails too.

        The effects after the one that raised are lost, so the listener is told here if it was to be told.
        """
        self._faults.note("a context", error, context=context.id)
        if context.state in (ContextState.WAITING, ContextState.CANCELLING, ContextState.ENDED):
            # A cancel may be among the lost effects, and is not sent again.
            self._retire_under(context)
        must_forget = False
        try:
            for effect in context.fail(LastcallFault(error), now()):
                self._perform(context, effect)
        except Exception as second:
            self._faults.note("a context", second, context=context.id)
            self._retire_under(context)
            must_forget = True
        if context.listener is not None:
            self._perform(context, Tell(LastcallFault(error), None))
        if context not in self.claims:
            return
        connection = self.connection_of(context)
        if must_forget or context.state is ContextState.ENDED or connection is None or connection.is_gone:
            self._end(context, "forced")
        else:
            connection.watch(context.deadline)

    def _retire_under(self, context: Context) -> None:
        """Have the context's connection take no other, because the server may still count this one."""
        connection = self.connection_of(context)
        if connection is not None:
            self._connections.retire(connection.entry)

    def _connection_of(self, context: Context) -> Connection:
        entry = self.claims[context].entry
        assert entry is not None
        return self._connections.by_entry[entry]

    def request(self, context: Context, *, first: bool = False) -> None:
        """Have a context wait for a place, with `first` before all others."""
        self.claims[context] = claim = Claim(lambda _: self._granted(context))
        self._capacity.request(claim, first=first)
        if claim.state is ClaimState.WAITING:
            since = now()
            left = max(0.0, context.acquire_at - since)
            timer = asyncio.get_running_loop().call_later(left, self._expire, context)
            self.waiting[context] = Waiting(since, timer)
            self._counters.waited += 1
            self._connections.dial_as_wanted()

    def _expire(self, context: Context) -> None:
        if self._connections.is_unanswered:
            self.fail(context, AcquireTimeout("no handshake with Inworld was answered in time; try again"))
        else:
            self.act(context, context.expire, now())

    def _granted(self, context: Context) -> None:
        at = now()
        waiting = self.waiting.pop(context, None)
        if waiting is not None:
            waiting.timer.cancel()
            self._counters.wait_seconds += at - waiting.since
        self._counters.granted += 1
        self._capacity.create_sent(self.claims[context])
        # A hyphen is no letter of base64, so the id can't stand in any audio.
        id = f"lc-{os.urandom(8).hex()}"
        self._connection_of(context).contexts[id] = context
        self._second_tries.sent()
        self.act(context, context.granted, id, at, self._second_tries.after)

    def try_slow_elsewhere(self) -> None:
        """Look at every slow create again: another connection is open."""
        sent_by = now() - self._second_tries.after
        for context in list(self.claims):
            if context.sent_at <= sent_by:
                self._try_elsewhere(context)

    def _try_elsewhere(self, context: Context) -> None:
        """Have a slow create tried on another connection, if that may help and the allowance is there.

        The first try goes on until an open connection has a place for the second: a handshake may be refused.
        """
        connection = self.connection_of(context)
        if connection is None or not context.may_try_elsewhere or not self._second_tries.is_left:
            return
        is_slow_everywhere = any(
            self._second_tries.is_slow(other.longest_create(since=context.sent_at))
            for other in self._connections.by_entry.values()
            if other is not connection
        )
        if is_slow_everywhere:
            return
        if not self._connections.has_room_beside(connection, context.sent_at):
            self._connections.dial_beside()
        elif self._second_tries.take():
            self._counters.second_tries += 1
            self.act(context, context.try_elsewhere, now())

    def _retry(self, context: Context, remainder: Context | None) -> None:
        self._counters.retries += 1
        connection = self._connection_of(context)
        # No longer this context's, whatever raises below: two contexts would give one place back.
        claim = self.claims.pop(context)
        if remainder is None:
            connection.contexts.pop(context.id)
            self._capacity.release(claim)
        else:
            self.claims[remainder] = claim
            connection.contexts[remainder.id] = remainder
            self.act(remainder, remainder.cancel, now())
            self._connections.retire_silent(connection, context.sent_at)
        self.request(context, first=True)

    def _end(self, context: Context, fate: str) -> None:
        """Forget a context. After a fault in here, a second call does what the first has left undone."""
        claim = self.claims.get(context)
        if claim is None:
            return
        connection = None if claim.entry is None else self._connections.by_entry[claim.entry]
        if connection is not None:
            connection.contexts.pop(context.id, None)
        self._capacity.release(claim)
        del self.claims[context]
        waiting = self.waiting.pop(context, None)
        if waiting is not None:
            waiting.timer.cancel()
            if not self._capacity.waiters:
                self._connections.stop_dialling()
        if self._tally.is_counting:
            if connection is not None:
                self._tally.contexts[fate] += 1
            self._changed.notify()
        if connection is not None:
            connection.report_idle()
