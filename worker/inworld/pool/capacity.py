"""The places of contexts on connections: the pool's decisions, without I/O, clock or tasks.

A `PoolEntry` is a connection as the account's limit counts it. A `Claim` is what one context has: a turn in
the queue, or a place on a connection. Every change happens at once, between two awaits of the caller, so at
each instant every place has one owner:

    places of an open entry = free + granted (create not yet sent) + sent (the server may count it)

Waiting claims are served first come, first served, each by one call of `on_grant`. A shared event would lose
wakeups: another waiter's `clear()` can fall between the set and the wake. `_serve` is the one function that
hands places on. Every change that gives capacity back ends in `_serve`: a place released, a connection
opened, a waiter gone. No path can therefore forget to wake the next waiter.

A claim belongs to no connection until a place is granted. A handshake that hangs or fails therefore holds up
no waiter in particular, and the first place that comes free goes to the claim that has waited longest.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

from lastcall.worker.inworld.pool.lifecycles import CONNECTION_TABLE, ConnectionEvent, ConnectionState


class ClaimState(enum.Enum):
    """The possession of a claim: nothing, a turn in the queue, or a place."""

    NONE = "none"  # nothing yet, or nothing any more
    WAITING = "waiting"  # a turn in the queue
    GRANTED = "granted"  # a place, of which the server knows nothing
    SENT = "sent"  # a place that the server counts, or is about to


class PoolEntry:
    """One connection's state and its places.

    `taken`: places that claims have. `is_slow`: the handshake takes so long that another may be started
    beside it. `was_used`: a create was sent on this connection. `is_replacement`: dialled in place of an idle
    or silent connection, not because a claim waits.
    """

    __slots__ = ("is_replacement", "is_slow", "number", "state", "taken", "was_used")

    def __init__(self, number: int) -> None:
        self.number = number
        self.state = ConnectionState.DIALLING
        self.taken = 0
        self.is_slow = False
        self.was_used = False
        self.is_replacement = False

    def move(self, event: ConnectionEvent) -> None:
        """Change the state, as the table has it."""
        self.state = CONNECTION_TABLE[self.state, event]


class Claim:
    """One context's claim. `on_grant` is called at the moment of the grant, and must not wait or fail."""

    __slots__ = ("entry", "on_grant", "state")

    def __init__(self, on_grant: Callable[[PoolEntry], None]) -> None:
        self.on_grant = on_grant
        self.state = ClaimState.NONE
        self.entry: PoolEntry | None = None


class Capacity:
    """All entries, all claims, and the queue between them."""

    def __init__(self, max_connections: int, max_contexts: int) -> None:
        self.max_connections = max_connections
        self.max_contexts = max_contexts
        self.entries: dict[PoolEntry, None] = {}
        self._waiting: dict[Claim, None] = {}
        self._last_number = 0
        self._is_serving = False

    # -- what there is ------------------------------------------------------------------------------------

    @property
    def waiters(self) -> int:
        """How many claims wait for a place."""
        return len(self._waiting)

    @property
    def taken(self) -> int:
        """How many places are taken, on all connections."""
        return sum(entry.taken for entry in self.entries)

    @property
    def dialling(self) -> list[PoolEntry]:
        """The connections whose handshake is under way."""
        return [entry for entry in self.entries if entry.state is ConnectionState.DIALLING]

    @property
    def idle(self) -> list[PoolEntry]:
        """The open connections without a taken place."""
        return [entry for entry in self.entries if entry.state is ConnectionState.OPEN and not entry.taken]

    @property
    def free(self) -> list[PoolEntry]:
        """The open connections with a free place."""
        return [
            entry
            for entry in self.entries
            if entry.state is ConnectionState.OPEN and entry.taken < self.max_contexts
        ]

    def wanted(self) -> int:
        """Return how many handshakes to start now, so that every waiting claim will have a place.

        A slow handshake gets one beside it, but only one: a server that answers nobody must not be flooded.
        """
        room = self.max_connections - len(self.entries)
        if not room or not self._waiting:
            return 0
        dialling = self.dialling
        need = math.ceil(len(self._waiting) / self.max_contexts)
        slow = sum(entry.is_slow for entry in dialling)
        return max(0, min(need + min(slow, need) - len(dialling), room))

    # -- claims -------------------------------------------------------------------------------------------

    def request(self, claim: Claim, *, first: bool = False) -> None:
        """Have a claim wait for a place; the place may be granted before this returns.

        `first` puts the claim in front of all others. A context that is retried sets `first`, because the
        context has waited once already.
        """
        assert claim.state is ClaimState.NONE
        claim.state = ClaimState.WAITING
        self._waiting = {claim: None, **self._waiting} if first else self._waiting
        self._waiting[claim] = None
        self._serve()

    def create_sent(self, claim: Claim) -> None:
        """Note that the server may count the place from now on."""
        assert claim.state is ClaimState.GRANTED and claim.entry is not None
        claim.state = ClaimState.SENT
        claim.entry.was_used = True

    def release(self, claim: Claim) -> None:
        """Give back the claim's place, or its turn. Nothing happens the second time."""
        entry = claim.entry
        if claim.state is ClaimState.WAITING:
            del self._waiting[claim]
        elif entry is not None:
            entry.taken -= 1
        claim.state, claim.entry = ClaimState.NONE, None
        self._serve()

    # -- entries ------------------------------------------------------------------------------------------

    def dial(self, *, is_replacement: bool = False) -> PoolEntry:
        """Count one more connection, from before its first packet on."""
        assert len(self.entries) < self.max_connections
        self._last_number += 1
        entry = PoolEntry(self._last_number)
        entry.is_replacement = is_replacement
        self.entries[entry] = None
        return entry

    def opened(self, entry: PoolEntry) -> None:
        """Note that the handshake has succeeded."""
        entry.move(ConnectionEvent.CONNECT)
        self._serve()

    def retire(self, entry: PoolEntry) -> None:
        """Put no new context on a connection; those on it stay."""
        if entry.state is ConnectionState.OPEN:
            entry.move(ConnectionEvent.RETIRE)

    def close(self, entry: PoolEntry) -> None:
        """Note that a connection, or its handshake, is being ended; it counts until it is gone."""
        if entry.state is not ConnectionState.CLOSING:
            entry.move(ConnectionEvent.CLOSE)

    def gone(self, entry: PoolEntry) -> None:
        """Count a connection no more. Its claims are released before, or by their owner afterwards."""
        del self.entries[entry]
        entry.move(ConnectionEvent.END)
        self._serve()

    # -- the one function that hands places on --------------------------------------------------------------

    def _serve(self) -> None:
        # A grant whose context ends at once releases its claim, and comes back here.
        if self._is_serving or not self._waiting:
            return
        self._is_serving = True
        try:
            while self._waiting and (entry := self._best()) is not None:
                claim = next(iter(self._waiting))
                del self._waiting[claim]
                entry.taken += 1
                claim.state, claim.entry = ClaimState.GRANTED, entry
                claim.on_grant(entry)
        finally:
            self._is_serving = False

    def _best(self) -> PoolEntry | None:
        """Return the fullest connection with a free place: few full ones leave the others to go idle."""
        # Every create and every end comes here, so no function is called for each entry.
        best, most, limit = None, -1, self.max_contexts
        for entry in self.entries:
            if most < entry.taken < limit and entry.state is ConnectionState.OPEN:
                best, most = entry, entry.taken
                if most == limit - 1:
                    break
        return best
