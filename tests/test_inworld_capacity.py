"""The pool's decisions alone: the claims that wait, the claims that have a place, the number of dials."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lastcall.worker.inworld.pool.capacity import Capacity, Claim, ClaimState, PoolEntry
from lastcall.worker.inworld.pool.lifecycles import ConnectionState


def consistent(capacity: Capacity, claims: list[Claim]) -> None:
    """Assert that every place has one owner, and that no claim waits while one is free."""
    assert len(capacity.entries) <= capacity.max_connections
    free = 0
    for entry in capacity.entries:
        owners = [claim for claim in claims if claim.entry is entry]
        granted = sum(claim.state is ClaimState.GRANTED for claim in owners)
        sent = sum(claim.state is ClaimState.SENT for claim in owners)
        assert entry.taken == granted + sent
        assert 0 <= entry.taken <= capacity.max_contexts
        if entry.state is ConnectionState.OPEN:
            free += capacity.max_contexts - entry.taken
    waiting = sum(claim.state is ClaimState.WAITING for claim in claims)
    assert capacity.waiters == waiting
    assert not (waiting and free), "a claim waits while a place is free"
    if waiting and len(capacity.entries) < capacity.max_connections:
        assert capacity.dialling or capacity.wanted(), "a claim waits and nothing is done about it"


class Walk(RuleBasedStateMachine):
    """Any order of arrivals, cancellations, ends, dials and losses."""

    @initialize(connections=st.integers(1, 4), contexts=st.integers(1, 5))
    def begin(self, connections: int, contexts: int) -> None:
        self.capacity = Capacity(connections, contexts)
        self.claims: list[Claim] = []
        self.queue: deque[Claim] = deque()

    def claim(self) -> Claim:
        claim = Claim(lambda entry: self.granted(claim, entry))
        self.claims.append(claim)
        return claim

    def granted(self, claim: Claim, entry: PoolEntry) -> None:
        assert entry.state is ConnectionState.OPEN
        assert claim is self.queue.popleft(), "served out of turn"

    def choose(self, data: Any, *states: ClaimState) -> Claim | None:
        some = [claim for claim in self.claims if claim.state in states]
        return data.draw(st.sampled_from(some)) if some else None

    def entry(self, data: Any, *states: ConnectionState) -> PoolEntry | None:
        some = [entry for entry in self.capacity.entries if entry.state in states]
        return data.draw(st.sampled_from(some)) if some else None

    @rule()
    def arrive(self) -> None:
        claim = self.claim()
        self.queue.append(claim)
        self.capacity.request(claim)

    @rule()
    def come_back(self) -> None:
        claim = self.claim()
        self.queue.appendleft(claim)
        self.capacity.request(claim, first=True)

    @rule(data=st.data())
    def create(self, data: Any) -> None:
        if (claim := self.choose(data, ClaimState.GRANTED)) is not None:
            self.capacity.create_sent(claim)

    @rule(data=st.data(), again=st.booleans())
    def let_go(self, data: Any, again: bool) -> None:
        """A waiter is cancelled, or a holder ends; twice is as once."""
        claim = self.choose(data, ClaimState.WAITING, ClaimState.GRANTED, ClaimState.SENT)
        if claim is not None:
            if claim in self.queue:
                self.queue.remove(claim)
            self.capacity.release(claim)
            if again:
                self.capacity.release(claim)
            self.claims.remove(claim)

    @precondition(lambda self: self.capacity.wanted())
    @rule()
    def dial(self) -> None:
        self.capacity.dial()

    @rule(data=st.data())
    def connect(self, data: Any) -> None:
        if (entry := self.entry(data, ConnectionState.DIALLING)) is not None:
            self.capacity.opened(entry)

    @rule(data=st.data())
    def be_slow(self, data: Any) -> None:
        if (entry := self.entry(data, ConnectionState.DIALLING)) is not None:
            entry.is_slow = True

    @rule(data=st.data())
    def retire(self, data: Any) -> None:
        if (entry := self.entry(data, ConnectionState.OPEN)) is not None:
            self.capacity.retire(entry)

    @rule(data=st.data())
    def close(self, data: Any) -> None:
        if (entry := self.entry(data, *ConnectionState)) is not None:
            self.capacity.close(entry)

    @rule(data=st.data(), before=st.booleans())
    def lose(self, data: Any, before: bool) -> None:
        """A connection goes; its claims are freed before or after that."""
        if (entry := self.entry(data, *ConnectionState)) is None:
            return
        owners = [claim for claim in self.claims if claim.entry is entry]
        if not before:
            self.capacity.close(entry)
        for claim in owners if before else []:
            self.capacity.retire(entry)
            self.capacity.release(claim)
        self.capacity.gone(entry)
        for claim in owners:
            self.capacity.release(claim)
            self.claims.remove(claim)

    @invariant()
    def holds(self) -> None:
        consistent(self.capacity, self.claims)


Walk.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestWalk = Walk.TestCase


def test_every_order_of_release_cancel_wait_and_loss() -> None:
    """In each of the 5,040 orders of seven events on one full connection nobody is left asleep.

    Fails with one event for all waiters in place of a call for each: a clear between set and wake is lost.
    """
    for order in itertools.permutations(range(7)):
        capacity = Capacity(2, 2)
        entry = capacity.dial()
        capacity.opened(entry)
        claims = [Claim(lambda _: None) for _ in range(6)]
        a, b, c, d, e, f = claims
        capacity.request(a)
        capacity.request(b)
        capacity.request(c)
        events: list[Callable[[], None]] = [
            partial(capacity.release, a),
            partial(capacity.release, b),
            partial(capacity.release, c),
            partial(capacity.request, d),
            partial(capacity.request, e),
            partial(capacity.request, f, first=True),
            partial(capacity.retire, entry),
        ]
        for number in order:
            events[number]()
            while capacity.wanted() and entry.state is ConnectionState.RETIRED:
                capacity.opened(capacity.dial())
            consistent(capacity, claims)


def test_dials_are_as_many_as_the_waiters_need() -> None:
    """One dial for each five that wait, never above the limit; a slow one gets one beside it, not more."""
    capacity = Capacity(20, 5)
    claims = [Claim(lambda _: None) for _ in range(200)]
    capacity.request(claims[0])
    assert capacity.wanted() == 1
    entry = capacity.dial()
    assert capacity.wanted() == 0
    entry.is_slow = True
    assert capacity.wanted() == 1
    second = capacity.dial()
    second.is_slow = True
    assert capacity.wanted() == 0
    for claim in claims[1:]:
        capacity.request(claim)
    assert capacity.wanted() == 18
    for _ in range(18):
        capacity.dial()
    assert capacity.wanted() == 0


def test_the_fullest_connection_is_filled_first() -> None:
    """Contexts go where others are, so that the other connections may go idle."""
    capacity = Capacity(3, 5)
    claims = [Claim(lambda _: None) for _ in range(8)]
    for _ in range(2):
        capacity.opened(capacity.dial())
    for claim in claims[:6]:
        capacity.request(claim)
    first, second = capacity.entries
    assert (first.taken, second.taken) == (5, 1)
    capacity.release(claims[0])
    capacity.request(claims[6])
    assert (first.taken, second.taken) == (5, 1)
