"""The pool against a server with limits and faults: each defined end, and who is not harmed by it.

Defects that pools of this kind have had are each shown by one test, which fails with the defect put back;
`scripts/mutate` puts them back and says so.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest

from tests.inworld import CONFIG, PATIENCE, Pair, pair, quick, until
from worker.inworld.connection import MAX_UNSENT
from worker.inworld.errors import (
    AcquireTimeout,
    ConnectionLost,
    ContextError,
    InworldError,
    KeyRefused,
    Overflow,
    PoolClosed,
    Silent,
)
from worker.inworld.protocol import Action, Kind, send_text
from worker.inworld.states import LineState
from worker.local.inworld import Faults, Limits, Speech

LONG = "This goes on and on. " * 40


async def many(count: int, pool: Pair) -> None:
    """Have so many callers speak at once; all must succeed."""
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(pool.say())


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

    Fails if the first caller's dial is its own.
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
            await until(lambda: not p.pool.slots.lines)
        p.server.faults.handshake_hang = False
        await many(100, p)


async def test_a_waiter_outlives_the_cancelled_callers_before_it() -> None:
    """Five callers in a hung handshake are cancelled; the sixth, behind them, is served.

    Fails if a cancelled caller keeps its turn.
    """
    timings = quick(slow_dial=0.1, dial=2.0)
    async with pair(faults=Faults(handshake_hang=True), timings=timings) as p:
        before = [asyncio.ensure_future(p.acquire()) for _ in range(5)]
        sixth = asyncio.ensure_future(p.acquire())
        await until(lambda: p.pool.figures.waiters == 6)
        for caller in before:
            caller.cancel()
        p.server.faults.handshake_hang = False
        await (await sixth).release()


async def test_a_dial_that_nobody_waits_for_is_ended() -> None:
    """With its last caller gone a hung dial is cancelled, and its socket closed. Fails if it is left."""
    async with pair(faults=Faults(handshake_hang=True), timings=quick(dial=600.0)) as p:
        caller = asyncio.ensure_future(p.acquire())
        await until(lambda: p.pool.figures.dialling == 1)
        caller.cancel()
        await until(lambda: p.pool.figures.connections == 0 and not p.pool.tasks)


async def test_every_timing_of_release_cancel_and_wait() -> None:
    """64 interleavings on one full connection: who is not cancelled is served. Fails if a wakeup is lost."""

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
        with pytest.raises(AcquireTimeout):
            async with asyncio.timeout(PATIENCE):
                await p.acquire(timeout=0.1)
        await until(lambda: not p.pool.slots.lines)


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


@pytest.mark.parametrize("status", [429, 500])
async def test_a_refused_handshake_is_tried_again(status: int) -> None:
    """429 and failures are retried while somebody waits, who does not notice. Fails if they are raised."""
    async with pair(faults=Faults(handshake_status=status)) as p:
        caller = asyncio.ensure_future(p.acquire())
        await until(lambda: p.server.counts["refused"] >= 3)
        p.server.faults.handshake_status = 0
        await (await caller).release()
        assert p.pool.figures.failed_dials >= 3
        assert bool(p.pool.figures.refusals) is (status == 429)


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
        assert p.pool.slots.wanted() == 0


async def test_a_refused_key_is_told_at_once() -> None:
    """A wrong key fails who waits, with the reason; a new one is used from the next connection on."""
    async with pair() as p:
        right = p.server.api_key
        p.pool.set_key("wrong")
        with pytest.raises(KeyRefused, match="401"):
            await p.acquire(timeout=60.0)
        p.pool.set_key(right)
        await p.say()


async def test_no_server_at_all() -> None:
    """With nobody listening an acquire ends in its timeout, and the pool is as before."""
    async with pair() as p:
        p.pool.url = "ws://127.0.0.1:9/"
        with pytest.raises(AcquireTimeout):
            await p.acquire(timeout=0.3)
        p.pool.url = p.server.ws_url
        await p.say()


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


# -- streams that go wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [False, True])
async def test_an_error_in_mid_stream_costs_one_context(ends: bool) -> None:
    """Its reader is told, and the place comes back, whether the server keeps the context or not.

    Fails if the context is forgotten at the error: the server still counts it, and refuses later ones.
    """
    async with pair(faults=Faults(speech_error=True, error_ends_context=ends), max_connections=1) as p:
        for _ in range(12):
            stream = await p.acquire()
            await stream.send_text("Hello.")
            with pytest.raises(ContextError, match="synthesis failed"):
                async for _ in stream:
                    pass
        p.server.faults.speech_error = False
        await p.settled()
        await many(10, p)
        assert not p.server.events_of("context_refused")
    p.orderly()


@pytest.mark.parametrize("kind", ["text", "null", "list"])
async def test_malformed_frames_have_a_defined_end(kind: str) -> None:
    """One retires its connection, which goes on for who is on it; a few end it. Fails if it is kept."""
    async with pair() as p:
        p.server.faults.malformed = kind  # type: ignore[assignment]  # one of its literals
        stream = await p.acquire()
        (connection,) = p.pool.connections.values()
        assert connection.line.state is LineState.RETIRED
        assert [frame async for frame in stream.speak("Still here.")]
        await until(lambda: p.server.open_connections == 0)
        p.server.faults.malformed = ""
        stream = await p.acquire()
        for _ in range(3):
            await p.server.send_raw("}")
        with pytest.raises(ConnectionLost, match="malformed"):
            await anext(stream)
        await until(lambda: p.server.open_connections == 0)
        await p.say()


async def test_a_context_that_is_never_closed_costs_its_connection() -> None:
    """Closed and then silent, it fails; others of its connection end in peace, and then that is closed.

    Fails if only our side forgets it: the server still counts it.
    """
    timings = quick(silence=0.6, cancel=0.6, cancel_hint=0.2)
    async with pair(speech=Speech(pace="real-time"), timings=timings) as p:
        p.server.faults.cancel = "ignored"
        other = await p.acquire()
        p.server.faults.closed_never = True
        with pytest.raises(Silent):
            await p.say()
        (connection,) = p.pool.connections.values()
        assert connection.line.state is LineState.RETIRED
        await other.send_text("I am still served.")
        await other.flush()
        assert (await anext(other)).kind is Kind.AUDIO
        p.server.faults.closed_never = False
        fresh = await p.acquire()
        assert p.server.counts["connected"] == 2
        other.close()
        fresh.close()
        await until(lambda: connection.line.state is LineState.GONE)


async def test_barge_in_frees_the_place_at_once() -> None:
    """A cancel stops a speech of a minute; the next one in line has the place. Fails if it is a close."""
    async with pair(speech=Speech(pace="real-time"), max_connections=1, max_contexts=1) as p:
        stream = await p.acquire()
        await stream.send_text(LONG)
        await stream.flush()
        await anext(stream)
        stream.cancel()
        await (await p.acquire(timeout=PATIENCE)).release()
        assert p.server.events_of("cancel_requested")


@pytest.mark.parametrize("cancel", ["ignored", "error"])
async def test_a_server_that_knows_no_cancel_is_asked_to_close(cancel: str) -> None:
    """The place comes back by close_context then, and the connection stays."""
    async with pair(max_connections=1, max_contexts=1, timings=quick(cancel=PATIENCE, cancel_hint=0.1)) as p:
        p.server.faults.cancel = cancel  # type: ignore[assignment]  # one of its literals
        (await p.acquire()).cancel()
        await (await p.acquire(timeout=PATIENCE)).release()
        assert p.server.counts["connected"] == 1
        assert len(p.server.events_of("close_requested")) == 2


async def test_an_unanswered_cancel_costs_the_connection() -> None:
    """If neither a cancel nor a close is answered, the connection is closed, and others are dialled."""
    timings = quick(cancel=0.6, cancel_hint=0.2)
    faults = Faults(cancel="ignored", closed_never=True)
    async with pair(faults=faults, timings=timings, max_connections=1) as p:
        (await p.acquire()).cancel()
        await until(lambda: p.server.open_connections == 0)
        p.server.faults.closed_never = False
        await p.say()


async def test_a_lost_connection_fails_its_own_contexts_only() -> None:
    """Cut, each reader is told; the next contexts are served by new connections."""
    async with pair() as p:
        streams = await asyncio.gather(*(p.acquire() for _ in range(7)))
        p.server.connections[1].abort()
        results = await asyncio.gather(*(anext(each) for each in streams[:5]), return_exceptions=True)
        assert all(isinstance(result, ConnectionLost) for result in results)
        for stream in streams[5:]:
            await stream.send_text("Not me.")
            await stream.release()
        assert p.pool.figures.lost == 1
        await many(10, p)


async def test_an_idle_connection_that_has_died_is_not_noticed_by_callers() -> None:
    """The server drops what is idle; whoever comes next is served by a new connection."""
    async with pair() as p:
        for _ in range(3):
            await p.say()
            p.server.cut_connections()
            await p.say()
            await p.server.close_connections(1001)
            await p.say()


async def test_a_peer_that_does_not_read_is_given_up() -> None:
    """What waits to be sent is bounded, the sender waits, then is told. Fails without bound or deadline."""
    async with pair(speech=Speech(chars_per_second=1e6), timings=quick(stall=0.5)) as p:
        stream = await p.acquire()
        (connection,) = p.pool.connections.values()
        p.server.faults.stop_reading = True
        most = 0
        with pytest.raises(ConnectionLost):
            async with asyncio.timeout(PATIENCE):
                while True:
                    await stream.send_text("x" * 100_000)
                    most = max(most, connection.outbox.size)
        assert most < 2 * MAX_UNSENT
        await until(lambda: connection.line.state is LineState.GONE)
        p.server.faults.stop_reading = False
        await p.say()


async def test_a_reader_that_does_not_read_is_told() -> None:
    """Unread audio is bounded; the context is cancelled, and others of its connection go on."""
    async with pair(max_unread=50_000) as p:
        slow, other = await p.acquire(), await p.acquire()
        await slow.send_text(LONG)
        await slow.flush()
        await until(lambda: p.server.events_of("cancel_requested"))
        with pytest.raises(Overflow):
            await anext(slow)
        assert [frame async for frame in other.speak("Fine.")]
        await p.settled()


async def test_text_of_any_length_is_sent_in_pieces() -> None:
    """The server's limit for one send_text is kept, and all of the text arrives."""
    async with pair() as p:
        await p.say(LONG * 4)
        texts = [event.detail["chars"] for event in p.server.events_of("text")]
        assert sum(texts) == len(LONG * 4) and max(texts) <= 1000 and len(texts) == 4
        assert not p.server.events_of("error")


async def test_what_is_sent_before_the_context_exists_is_bounded() -> None:
    """A waiting context keeps what it is sent, up to a bound, and then fails."""
    async with pair(faults=Faults(handshake_hang=True)) as p:
        seen: list[InworldError | None] = []

        class Sink:
            def on_frame(self, frame: object, context: object) -> None:
                raise AssertionError("no frame can come")

            def on_end(self, error: InworldError | None, frame: object, context: object) -> None:
                seen.append(error)

        context = p.pool.start(CONFIG, Sink())
        for _ in range(100):
            context.send(Action.TEXT, send_text("x" * 1000))
        assert len(seen) == 1 and isinstance(seen[0], Overflow)
        assert p.pool.figures.waiters == 0


# -- idle connections ---------------------------------------------------------------------------------------


async def test_idle_connections_are_closed_but_one() -> None:
    """Of eight connections seven are closed after their idle time, with code 1000, and one is kept."""
    async with pair(idle_connection_timeout=0.1) as p:
        for stream in await asyncio.gather(*(p.acquire() for _ in range(40))):
            stream.close()
        await p.settled()
        await until(lambda: p.server.open_connections == 1)
        p.orderly()
        await until(lambda: p.pool.figures.connections == 1)
        await p.say()
        assert p.server.counts["connected"] == 8


async def test_the_warm_connection_is_replaced_once() -> None:
    """Used, it is replaced before the server would close it, dial first; unused, its successor is let go."""
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


async def test_an_idle_pool_sets_no_alarm_but_its_own() -> None:
    """With one warm connection and nothing to do, the next thing to happen is its idle time."""
    async with pair(timings=quick(create=1.0, silence=1.0, stall=1.0, slow_dial=0.5)) as p:
        await p.say()
        await p.settled()
        (connection,) = p.pool.connections.values()
        # Those of the dial and of the last context ring once more.
        await until(lambda: p.pool._alarm.at >= connection.idle_since + 300.0)
        await until(lambda: connection._alarm._handle is None)


# -- after the close ----------------------------------------------------------------------------------------


async def test_use_after_close_raises() -> None:
    """A closed pool opens nothing. Fails if a context is asked of a new connection silently."""
    async with pair() as p:
        await p.say()
        await p.pool.aclose()
        with pytest.raises(PoolClosed):
            await p.acquire()
        assert p.server.counts["connected"] == 1
