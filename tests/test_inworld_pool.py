"""The pool against a server with limits and faults: each fault has a defined end, and harms no other caller.

For each defect that pools of this kind have had there is one test that fails with the defect put back.
`scripts/mutate` puts each defect back, and checks that the test fails.
"""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from lastcall.worker.base.clock import now
from lastcall.worker.inworld.pool.dialling import DialError
from lastcall.worker.inworld.pool.errors import (
    AcquireTimeout,
    ContextError,
    KeyRefused,
    PoolClosed,
    Unreachable,
)
from lastcall.worker.inworld.pool.redialling import Redialling
from lastcall.worker.inworld.pool.timings import Timings
from lastcall.worker.local.inworld_connection import ServerConnection
from lastcall.worker.local.inworld_server import Faults, Limits
from tests.support.inworld import PATIENCE, many, pair, quick, until

LONG = "This goes on and on. " * 40


async def test_capacity_is_shared_and_limits_are_kept() -> None:
    """200 callers at once are all served, on 20 connections of 5 contexts and never more."""
    async with pair() as p:
        await many(200, p)
        assert (p.server.peak_connections, p.server.peak_contexts) == (20, 5)
        assert not p.server.events_of("refused") and not p.server.events_of("context_refused")
        figures = p.pool.figures
        assert (figures.granted, figures.contexts, figures.waiters) == (200, 0, 0)
        assert figures.waited and figures.wait_seconds > 0
    p.orderly()


async def test_eight_contexts_take_two_connections() -> None:
    """The sixth context goes to a second connection; none is refused. Fails with a capacity of six."""
    async with pair() as p:
        streams = await asyncio.gather(*(p.acquire() for _ in range(8)))
        assert (p.server.open_connections, p.server.open_contexts) == (2, 8)
        assert not p.server.events_of("context_refused")
        for stream in streams:
            await stream.release()
    p.orderly()


async def test_a_slot_is_kept_until_the_server_says_closed() -> None:
    """While contextClosed is owed the place is not given away: no create is refused. Fails if it is."""
    async with pair(limits=Limits(connections=1, contexts=2), max_connections=1, max_contexts=2) as p:
        p.server.faults.closed_delay = 0.05
        await many(20, p)
        assert not p.server.events_of("context_refused")


async def test_waiters_are_served_in_turn() -> None:
    """First come, first served, over one place."""
    order: list[int] = []
    async with pair(max_connections=1, max_contexts=1) as p:
        first = await p.acquire()

        async def wait(number: int) -> None:
            stream = await p.acquire()
            order.append(number)
            await stream.release()

        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
            for number in range(10):
                group.create_task(wait(number))
            await until(lambda: p.pool.figures.waiters == 10)
            await first.release()
    assert order == list(range(10))


# -- cancelled callers --------------------------------------------------------------------------------------


async def test_a_cancelled_opener_harms_nobody() -> None:
    """Of five callers on one handshake the first is cancelled; the other four are served by it.

    Fails if the handshake belongs to the first caller, because the handshake would be cancelled too.
    """
    async with pair(faults=Faults(handshake_delay=0.1), timings=quick(slow_dial=5.0)) as p:
        callers = [asyncio.ensure_future(p.acquire()) for _ in range(5)]
        await until(lambda: p.pool.figures.dialling == 1)
        callers[0].cancel()
        for stream in await asyncio.gather(*callers[1:]):
            await stream.release()
        assert p.server.counts["connected"] == 1


async def test_cancelled_callers_leave_no_reservation() -> None:
    """220 callers are cancelled in a hung handshake; then every place is there. Fails if one leaks."""
    async with pair(faults=Faults(handshake_hang=True)) as p:
        for _ in range(11):
            callers = [asyncio.ensure_future(p.acquire()) for _ in range(20)]
            await until(lambda: p.pool.figures.waiters == 20)
            for caller in callers:
                caller.cancel()
            await asyncio.wait(callers)
            await until(lambda: not p.pool.capacity.entries)
        p.server.faults.handshake_hang = False
        await many(100, p)


async def test_a_waiter_outlives_the_cancelled_callers_before_it() -> None:
    """Five callers on one handshake are cancelled; the sixth, behind them, is served.

    Fails if a cancelled caller keeps its turn.
    """
    async with pair(faults=Faults(handshake_delay=0.5), max_connections=1) as p:
        before = [asyncio.ensure_future(p.acquire()) for _ in range(5)]
        sixth = asyncio.ensure_future(p.acquire())
        await until(lambda: p.pool.figures.waiters == 6)
        for caller in before:
            caller.cancel()
        async with asyncio.timeout(PATIENCE):
            await (await sixth).release()


async def test_a_dial_that_nobody_waits_for_is_ended() -> None:
    """With its last caller gone a hung dial is cancelled, and its socket closed. Fails if it is left."""
    async with pair(faults=Faults(handshake_hang=True), timings=quick(dial=600.0)) as p:
        caller = asyncio.ensure_future(p.acquire())
        await until(lambda: p.pool.figures.dialling == 1)
        caller.cancel()
        await until(lambda: p.pool.figures.connections == 0 and not p.pool.tasks)


async def test_every_timing_of_release_cancel_and_wait() -> None:
    """64 interleavings on one full connection: a caller that is not cancelled is served.

    Fails if a wakeup is lost.
    """

    async with pair(max_connections=1, max_contexts=1) as p:

        async def pass_through(turns: int = 0) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            (await p.acquire(timeout=PATIENCE)).cancel()

        for release, cancel, wait in itertools.product(range(0, 12, 3), repeat=3):
            holder = await p.acquire()
            victim = asyncio.ensure_future(pass_through())
            async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
                group.create_task(pass_through())
                group.create_task(pass_through(wait))
                for turn in range(12):
                    if turn == release:
                        holder.cancel()
                    if turn == cancel:
                        victim.cancel()
                    await asyncio.sleep(0)
            await asyncio.wait({victim})
        await p.settled()


# -- handshakes ---------------------------------------------------------------------------------------------


async def test_acquire_keeps_its_timeout_in_a_hung_handshake() -> None:
    """One deadline covers all of an acquire. Fails if the dial is outside it."""
    async with pair(faults=Faults(handshake_hang=True), timings=quick(dial=600.0)) as p:
        with pytest.raises(AcquireTimeout, match="no handshake"):
            async with asyncio.timeout(PATIENCE):
                await p.acquire(timeout=0.1)
        await until(lambda: not p.pool.capacity.entries)


async def test_one_hung_handshake_holds_nobody_up() -> None:
    """Ten callers, the first dial hangs: all are served while it does. Fails if it is not doubled."""
    async with pair(faults=Faults(handshake_hang=True), timings=quick(dial=600.0, slow_dial=0.1)) as p:
        callers = [asyncio.ensure_future(p.acquire())]
        await until(lambda: p.server._transports)
        p.server.faults.handshake_hang = False
        callers += [asyncio.ensure_future(p.acquire()) for _ in range(9)]
        async with asyncio.timeout(PATIENCE):
            streams = await asyncio.gather(*callers)
        assert p.pool.figures.dialling == 1
        for stream in streams:
            await stream.release()


async def test_a_refused_handshake_is_tried_again() -> None:
    """429 is retried while a caller waits, and the caller does not notice. Fails if it is raised."""
    async with pair(faults=Faults(handshake_status=429)) as p:
        caller = asyncio.ensure_future(p.acquire())
        await until(lambda: p.server.counts["refused"] >= 3)
        p.server.faults.handshake_status = 0
        await (await caller).release()
        assert p.pool.figures.failed_dials == p.pool.figures.refusals >= 3


async def test_an_account_with_fewer_connections_is_shared_out() -> None:
    """If the account has 2 left instead of 20, 60 callers are served by those."""
    async with pair(limits=Limits(connections=2)) as p:
        await many(60, p)
        assert p.server.peak_connections == 2
        assert p.pool.figures.refusals


async def test_nobody_waits_so_nothing_is_dialled() -> None:
    """After the last caller has given up, a server that refuses is left in peace."""
    async with pair(faults=Faults(handshake_status=429), timings=quick(retry_cap=0.02)) as p:
        with pytest.raises(AcquireTimeout):
            await p.acquire(timeout=0.2)
        await until(lambda: not p.pool.tasks)
        assert p.pool.capacity.wanted() == 0


async def test_a_refused_key_is_told_at_once() -> None:
    """Callers that wait get the refusal of a wrong key. The next connection uses the new key."""
    async with pair() as p:
        right = p.server.api_key
        p.pool.set_key("wrong")
        with pytest.raises(KeyRefused, match="401"):
            await p.acquire(timeout=60.0)
        p.pool.set_key(right)
        await p.say()


async def test_a_refusal_of_the_key_before_fails_nobody() -> None:
    """A handshake under way with the key of before is refused: its caller is served with the new key."""
    async with pair(faults=Faults(handshake_delay=0.3)) as p:
        right = p.server.api_key
        p.pool.set_key("old")
        before = asyncio.ensure_future(p.say())
        await until(lambda: p.server._transports)
        p.pool.set_key(right)
        after = asyncio.ensure_future(p.say())
        async with asyncio.timeout(PATIENCE):
            assert await before and await after
        assert (p.pool.figures.failed_dials, p.server.counts["refused"]) == (1, 1)


OUTAGES = {
    "nobody listens": (Faults(), "Cannot connect"),
    "refused": (Faults(handshake_status=503), "503"),
    "cut": (Faults(handshake_cut=True), "Server disconnected"),
    "unanswered": (Faults(handshake_hang=True), "no handshake within 0.3 s"),
}


@pytest.mark.parametrize("outage", OUTAGES)
async def test_an_outage_is_told_at_once(outage: str) -> None:
    """A caller is told the cause at once, and does not wait; the first good dial ends the outage.

    While the outage is remembered, a hundred callers cost no handshake.
    """
    faults, cause = OUTAGES[outage]
    async with pair(faults=faults, timings=quick(dial=0.3, outage=600.0), acquire_timeout=600.0) as p:
        url = p.pool._connections.url
        if outage == "nobody listens":
            p.pool._connections.url = "ws://127.0.0.1:9/"

        async def fails() -> None:
            with pytest.raises(Unreachable, match=cause):
                await p.acquire()

        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(fails() for _ in range(5)))
            assert p.pool.figures.failed_dials == 1
            await asyncio.gather(*(fails() for _ in range(100)))
            assert p.pool.figures.failed_dials == 1 and not p.pool.tasks
            p.pool._connections.url = url
            p.server.faults.handshake_status = 0
            p.server.faults.handshake_cut = p.server.faults.handshake_hang = False
            p.pool._connections._redialling.at = 0.0  # the moment is over
            await many(20, p)


async def test_an_outage_beside_a_connection_is_told_at_its_second_failure() -> None:
    """A caller that waits beside an open connection waits for one more handshake, and is told then."""
    async with pair(max_contexts=1, timings=quick(outage=0.2), acquire_timeout=600.0) as p:
        holder = await p.acquire()
        p.server.faults.handshake_status = 503
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(Unreachable):
                await p.acquire()
            assert p.pool.figures.failed_dials == 2
            waiting = asyncio.ensure_future(p.acquire())
            p.server.faults.handshake_status = 429
            p.pool.set_key(p.server.api_key)
            await until(lambda: p.pool.figures.refusals)
            await holder.release()  # a full account is worth the wait
            await (await waiting).release()


async def test_a_slow_server_ends_the_outage_too() -> None:
    """Callers in an outage do not wait for a slow handshake; it goes on without them, and ends the outage."""
    async with pair(faults=Faults(handshake_status=503), timings=quick(slow_dial=0.1, outage=0.0)) as p:
        with pytest.raises(Unreachable):
            await p.acquire()
        p.server.faults.handshake_status = 0
        p.server.faults.handshake_delay = 1.0
        with pytest.raises(Unreachable, match="503"):
            await p.acquire(timeout=600.0)
        assert p.pool.figures.dialling == 1
        await until(lambda: p.pool.figures.dialling == 0)
        await p.say()
        assert p.server.counts["connected"] == 1


async def test_a_handshake_that_hangs_does_not_keep_the_outage() -> None:
    """The one that was to find out hangs: its callers are told, and a later caller has another and is served.

    Fails if a hung handshake keeps every other from beginning.
    """
    timings = quick(dial=600.0, slow_dial=0.2, outage=0.3)
    async with pair(faults=Faults(handshake_status=503), timings=timings) as p:
        with pytest.raises(Unreachable):
            await p.acquire(timeout=600.0)
        redialling = p.pool._connections._redialling
        p.server.faults.handshake_status, p.server.faults.handshake_hang = 0, True
        await until(lambda: redialling.at <= now())
        with pytest.raises(Unreachable, match="503"):
            await p.acquire(timeout=600.0)
        p.server.faults.handshake_hang = False
        await until(lambda: redialling.at <= now())
        await p.say(timeout=600.0)
        assert (p.pool.figures.dialling, p.server.counts["connected"]) == (1, 1)


def test_in_an_outage_one_handshake_begins_in_each_moment() -> None:
    """The next may begin a moment after this one, though this one hangs; those under way fail once."""
    redialling = Redialling(Timings(dial=10.0, outage=1.0), random.Random(1))
    redialling.failed(DialError("503", "failed"), began=99.0, at=100.0)
    redialling.began(102.0)
    assert redialling.at == 103.0
    redialling.began(103.0)
    redialling.failed(DialError("hung", "failed"), began=102.0, at=112.0)
    assert 112.5 <= redialling.at <= 113.0
    at = redialling.at
    redialling.failed(DialError("hung", "failed"), began=103.0, at=112.1)
    assert redialling.at == at


def test_an_outage_after_a_full_account_is_short() -> None:
    """A handshake that was under way fails during the long delay after a 429: it counts for a second."""
    redialling = Redialling(Timings(outage=1.0, retry_first=8.0, retry_cap=8.0), random.Random(1))
    redialling.failed(DialError("429", "refused"), began=100.0, at=101.0)
    assert redialling.at >= 105.0
    redialling.failed(DialError("hung", "failed"), began=99.0, at=102.0)
    assert redialling.outage is not None and redialling.at == 103.0


async def test_an_old_outage_is_told_to_nobody() -> None:
    """Long after a failure a caller meets a slow handshake, and is served by it. Fails if it is told."""
    async with pair(faults=Faults(handshake_status=503), timings=quick(slow_dial=0.1)) as p:
        with pytest.raises(Unreachable):
            await p.acquire()
        p.server.faults.handshake_status, p.server.faults.handshake_delay = 0, 0.5
        redialling = p.pool._connections._redialling
        assert now() < redialling._stale_at <= now() + p.pool.timings.outage + p.pool.timings.dial
        redialling._stale_at = 0.0  # hours later
        await p.say(timeout=PATIENCE)


async def test_a_server_that_closes_at_once_is_left_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that ends before a word is a handshake that failed: callers are told, and none is dialled.

    In the outage one handshake finds out, also if that one is accepted. Fails if an accepted handshake is
    taken for a success.
    """
    async with pair(timings=quick(outage=600.0, settle=1.0), acquire_timeout=600.0) as p:

        async def fails() -> None:
            with pytest.raises(Unreachable, match="after the handshake"):
                await p.acquire()

        async def close(connection: ServerConnection) -> None:
            await connection.ws.close(code=1013)

        async with asyncio.timeout(PATIENCE):
            with monkeypatch.context() as patched:
                patched.setattr(ServerConnection, "serve", close)
                await asyncio.gather(*(fails() for _ in range(100)))
                assert p.server.counts["connected"] <= 20
                await p.server.until(lambda: p.server.open_connections == 0, PATIENCE)
                before = p.server.counts["connected"]
                await asyncio.gather(*(fails() for _ in range(100)))
                assert p.server.counts["connected"] == before
                p.pool._connections._redialling.at = 0.0  # the moment is over
                await asyncio.gather(*(fails() for _ in range(100)))
                assert p.server.counts["connected"] == before + 1
            p.pool._connections._redialling.at = 0.0
            await many(20, p)


# -- creates ------------------------------------------------------------------------------------------------


async def test_an_unanswered_create_is_tried_on_another_connection() -> None:
    """Its caller does not notice, its text is spoken from the start, and the first try is cancelled."""
    async with pair(faults=Faults(create_unanswered=True), timings=quick(create=1.0)) as p:

        async def heal() -> None:
            await p.server.until(lambda: p.server.counts["connected"] == 2, PATIENCE)
            p.server.faults.create_unanswered = False

        healing = asyncio.ensure_future(heal())
        assert await p.say("Once more.") > 0
        await healing
        assert p.server.counts["connected"] == 2
        assert p.pool.figures.retries == 1
        first = next(e.context for e in p.server.events_of("context_created"))
        await p.server.until(
            lambda: first in {e.context for e in p.server.events_of("context_closed")}, PATIENCE
        )
    p.orderly()


async def test_a_create_is_tried_twice_at_most() -> None:
    """A server that answers no create costs two connections and one error."""
    async with pair(faults=Faults(create_unanswered=True), timings=quick(create=0.5)) as p:
        with pytest.raises(AcquireTimeout):
            await p.acquire()
        assert p.server.counts["context_created"] == 2
        p.server.faults.create_unanswered = False
        await p.settled()


async def test_a_refused_create_frees_its_place_at_once() -> None:
    """An error that answers a create is its caller's, and leaves nothing. Fails if the place stays taken."""
    async with pair(faults=Faults(create_error="status"), max_connections=1) as p:
        for _ in range(12):
            with pytest.raises(ContextError, match="Invalid voice"):
                await p.acquire()
            assert p.pool.figures.contexts == 0
        p.server.faults.create_error = ""
        await p.say()


async def test_a_nameless_error_is_given_to_the_create_that_waits() -> None:
    """A top-level error ends the acquire now, and its place is free. Fails if it is only logged."""
    async with pair(
        faults=Faults(create_error="top-level"), timings=quick(create=600.0), max_connections=1
    ) as p:
        with pytest.raises(ContextError, match="internal error"):
            async with asyncio.timeout(PATIENCE):
                await p.acquire(timeout=600.0)
        p.server.faults.create_error = ""
        await until(lambda: p.pool.figures.contexts == 0)
        await p.say()


async def test_a_server_that_counts_more_contexts_than_we_do() -> None:
    """Refused by the limit of a connection, a create goes to another, and its caller does not notice."""
    async with pair(limits=Limits(contexts=4)) as p:
        await many(10, p)
        assert p.server.events_of("context_refused")


# -- idle connections ---------------------------------------------------------------------------------------


async def test_idle_connections_are_closed_but_one() -> None:
    """Of eight connections seven are closed after their idle time, with code 1000, and one is kept."""
    async with pair(idle_connection_timeout=1.0) as p:
        for stream in await asyncio.gather(*(p.acquire() for _ in range(40))):
            stream.close()
        await p.settled()
        await until(lambda: p.server.open_connections == 1)
        p.orderly()
        await until(lambda: p.pool.figures.connections == 1)
        await p.say()
        assert p.server.counts["connected"] == 8


async def test_the_warm_connection_is_replaced_once() -> None:
    """A used connection is replaced before the server would close it; the handshake of the new one is first.

    The new connection is not used, so the pool closes it at its time and opens no other.
    """
    async with pair(timings=quick(warm=0.2)) as p:
        await p.say()
        await until(lambda: p.server.counts["connection_closed"] == 2)
        kinds = [
            (event.kind, event.connection)
            for event in p.server.events
            if event.kind in ("connected", "connection_closed")
        ]
        assert kinds == [
            ("connected", 1),
            ("connected", 2),
            ("connection_closed", 1),
            ("connection_closed", 2),
        ]
        p.orderly()
        await p.say()


async def test_an_idle_pool_sets_no_timer_but_for_pings_and_its_own() -> None:
    """With one warm connection and nothing to do, the next things to happen are a ping and its idle time."""
    async with pair(timings=quick(create=1.0, silence=1.0, stall=1.0, slow_dial=0.5)) as p:
        await p.say()
        await p.settled()
        (connection,) = p.pool.connections.values()
        # The timers of the handshake and of the last context fire once more.
        await until(lambda: p.pool._connections._timer.at >= connection.idle_since + 300.0)
        await until(lambda: connection._timer.at >= connection.idle_since + 29.9)


# -- after the close ----------------------------------------------------------------------------------------


async def test_use_after_close_raises() -> None:
    """A closed pool opens nothing. Fails if a context is asked of a new connection silently."""
    async with pair() as p:
        await p.say()
        await p.pool.aclose()
        with pytest.raises(PoolClosed):
            await p.acquire()
        assert p.server.counts["connected"] == 1
