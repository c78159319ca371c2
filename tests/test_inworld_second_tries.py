"""Connections that have died in silence: pings that find them, and creates that go out a second time."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future

import pytest

from lastcall.worker.base.clock import now
from lastcall.worker.inworld.pool.lifecycles import ConnectionState
from lastcall.worker.inworld.pool.pinging import Pinging, Verdict
from lastcall.worker.inworld.pool.pool import InworldPool
from lastcall.worker.inworld.pool.second_tries import SHARE, SecondTries
from lastcall.worker.inworld.pool.timer import NEVER
from lastcall.worker.local.inworld_server import Faults, InworldServer, Speech
from tests.support.inworld import CONFIG, PATIENCE, pair, quick, until
from tests.support.inworld_stream import acquire
from tests.support.slow_network import proxied

# No create is given up here, so a caller that is served in time is served by a second try.
EAGER = quick(create=600.0, second_try_first=0.3, second_try_least=0.3, cancel=0.5, close_handshake=0.2)

# -- decisions ----------------------------------------------------------------------------------------------


def test_pings_of_a_server_that_answers() -> None:
    """One each interval while idle; the first that is not answered in time means the connection is dead."""
    pinging = Pinging(30.0, 10.0)
    pinging.idle(100.0)
    assert (pinging.look(129.0), pinging.due) == (Verdict.WAIT, 130.0)
    assert (pinging.look(130.0), pinging.due) == (Verdict.PING, 140.0)
    pinging.pong(130.1)
    assert pinging.due == pytest.approx(160.1)
    assert pinging.look(160.2) is Verdict.PING
    pinging.idle(165.0)  # a context came and went: the missing pong means nothing
    assert (pinging.look(171.0), pinging.due) == (Verdict.WAIT, 195.0)
    assert pinging.look(195.0) is Verdict.PING
    assert (pinging.look(205.0), pinging.due) == (Verdict.DEAD, NEVER)


def test_pings_of_a_server_that_answers_none() -> None:
    """The connection is not dead for that, and no second ping goes out."""
    pinging = Pinging(30.0, 10.0)
    pinging.idle(0.0)
    assert pinging.look(30.0) is Verdict.PING
    assert (pinging.look(40.0), pinging.due) == (Verdict.WAIT, NEVER)
    pinging.idle(50.0)
    assert (pinging.look(1000.0), pinging.due) == (Verdict.WAIT, NEVER)
    pinging.pong(1001.0)  # late, but an answer
    assert pinging.look(1031.0) is Verdict.PING


def test_second_tries_have_an_allowance() -> None:
    """One at the start, then 5 % of all creates, of which no more than five are saved up."""
    tries = SecondTries(first=1.0, least=0.3, most=5.0)
    taken = 0
    for count in range(1, 1001):
        tries.sent()
        taken += tries.take()
        assert taken <= max(1.0, SHARE * count)
    assert taken >= SHARE * 1000 - 2
    for _ in range(10_000):
        tries.sent()
    assert sum(tries.take() for _ in range(100)) == 5


def test_the_time_that_a_create_may_take_follows_the_answers() -> None:
    """Short after quick answers, longer after slow or uneven ones, within its bounds."""
    tries = SecondTries(first=1.0, least=0.3, most=5.0)
    assert tries.after == 1.0
    for _ in range(50):
        tries.created(0.05)
    assert tries.after == 0.3
    for _ in range(50):
        tries.created(0.8)
    assert 0.79 < tries.after < 1.0
    for seconds in (0.1, 2.0) * 20:
        tries.created(seconds)
    assert 2.0 < tries.after <= 5.0
    for _ in range(20):
        tries.created(1e6)
    assert tries.after == 5.0
    assert tries.is_slow(2.5) and not tries.is_slow(2.4)


# -- pings --------------------------------------------------------------------------------------------------


async def test_an_idle_connection_that_stops_answering_is_ended() -> None:
    """Pinged while it answers, and ended when it does not, before a caller meets it."""
    async with pair(timings=quick(ping=0.1, pong=1.0)) as p:
        await p.say()
        await p.server.until(lambda: p.server.counts["ping"] >= 3, PATIENCE)
        assert p.server.counts["connected"] == 1
        p.server.faults.ping_unanswered = True
        await until(lambda: p.pool.figures.connections == 0)
        assert p.pool.figures.lost == 0
        await p.say()


async def test_a_pause_of_this_process_ends_no_connection() -> None:
    """A pong that came while nothing ran here is read before the connection is judged."""
    started: Future[InworldServer] = Future()
    over = threading.Event()

    async def serve() -> None:
        async with InworldServer() as server:
            started.set_result(server)
            while not over.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    server = await asyncio.wrap_future(started)
    try:
        async with InworldPool(server.ws_url, server.api_key, timings=quick(ping=0.2, pong=0.4)) as pool:
            await (await acquire(pool, CONFIG)).release()
            await until(lambda: server.counts["ping"] >= 2)
            (connection,) = pool.connections.values()
            real = connection._ws.ping
            paused: list[int] = []

            def pause(pings: int) -> None:
                deadline = now() + PATIENCE
                while server.counts["ping"] <= pings and now() < deadline:
                    time.sleep(0.01)
                time.sleep(0.8)  # the pong comes, and its time goes by

            async def ping(message: bytes = b"") -> None:
                pings = server.counts["ping"]
                await real(message)
                if not paused:
                    paused.append(pings)
                    asyncio.get_running_loop().call_soon(pause, pings)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(connection._ws, "ping", ping)
                await until(
                    lambda: paused and (server.counts["ping"] > paused[0] + 1 or not pool.connections)
                )
            assert list(pool.connections.values()) == [connection]
    finally:
        over.set()
        await asyncio.to_thread(thread.join)


@pytest.mark.parametrize("how", ["ping", "error"])
async def test_all_that_a_server_says_is_heard(how: str) -> None:
    """A ping of the server's and an error without a name show that the connection is alive."""
    async with pair() as p:
        await p.say()
        (connection,) = p.pool.connections.values()
        heard_at = connection.heard_at
        if how == "ping":
            await p.server.connections[1].ws.ping()
        else:
            await p.server.connections[1].send_raw('{"error": {"code": 3, "message": "what?"}}')
        await until(lambda: connection.heard_at > heard_at)


async def test_a_server_that_answers_no_ping_keeps_its_connection() -> None:
    """One ping goes out, no other, and the next caller uses the connection."""
    async with pair(faults=Faults(ping_unanswered=True), timings=quick(ping=0.1, pong=0.1)) as p:
        await p.say()
        (connection,) = p.pool.connections.values()
        await until(lambda: p.server.counts["ping"] and connection._pinging.due == NEVER)
        await p.say()
        await until(lambda: connection._timer.at > now() + 1.0)
        assert (p.server.counts["ping"], p.server.counts["connected"]) == (1, 1)


async def test_a_missing_pong_ends_no_connection_that_carries_audio() -> None:
    """The connection answered a ping before, then none; a context that came meanwhile speaks to its end."""
    speech = Speech(pace="real-time")
    async with pair(timings=quick(ping=0.2, pong=0.4), speech=speech) as p:
        await p.say("Hi.")
        await p.server.until(lambda: p.server.counts["ping"] >= 1, PATIENCE)
        stream = await p.acquire()
        p.server.faults.ping_unanswered = True
        assert [frame async for frame in stream.speak("I speak for longer than a pong may take.")]
        assert p.server.counts["connected"] == 1


# -- second tries -------------------------------------------------------------------------------------------


async def test_connections_that_a_firewall_has_forgotten_cost_a_moment() -> None:
    """Four idle connections swallow all they are sent; the next caller is served by one that is dialled."""
    async with pair(timings=EAGER, max_contexts=1) as p, proxied(p.server.port) as proxy:
        p.pool._connections.url = f"ws://127.0.0.1:{proxy.port}/"
        proxy.piece = 4096
        for stream in await asyncio.gather(*(p.acquire() for _ in range(4))):
            await stream.release()
        before = p.pool.figures.second_tries
        proxy.forget()
        assert await p.say("Hello there.", timeout=600.0) > 0
        assert p.pool.figures.second_tries == before + 1
        # The connections that were silent as long are not left for the next callers.
        for _ in range(3):
            await p.say()
        assert p.pool.figures.second_tries == before + 1
        assert p.server.counts["connected"] == 5


async def test_a_slow_create_is_heard_once() -> None:
    """The first try is answered after the second: it is cancelled upstream, and none of it is heard.

    Its place is not given away before the server has closed it.
    """
    async with pair() as p:
        alone = await p.say("Hello there.")
    async with pair(timings=EAGER, max_contexts=1, max_connections=2) as p:
        p.server.faults.create_delay = 3.0
        p.server.faults.cancel = "ignored"
        said = asyncio.ensure_future(p.say("Hello there."))
        await p.server.until(lambda: p.server.counts["connected"] == 2, PATIENCE)
        p.server.faults.create_delay = 0.0
        assert await said == alone
        first = p.server.events_of("context_created")[0].context
        await p.server.until(lambda: p.server.counts["cancel_requested"], PATIENCE)
        assert p.server.events_of("cancel_requested")[0].context == first
        assert p.pool.figures.second_tries == 1
        await p.settled()


REFUSALS = {
    "full": Faults(handshake_status=429),
    "down": Faults(handshake_status=503),
    "unanswered": Faults(handshake_hang=True),
}


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_slow_create_is_kept_until_another_connection_is_open(refusal: str) -> None:
    """No other connection can be had: the first try is answered in the end, and its connection stays.

    Fails if the first try is cancelled for a handshake that may be refused.
    """
    async with pair(timings=EAGER, max_contexts=1) as p:
        p.server.faults.create_delay = 1.5
        said = asyncio.ensure_future(p.say())
        await p.server.until(lambda: p.server.counts["context_created"], PATIENCE)
        (connection,) = p.pool.connections.values()
        p.server.faults.handshake_status = REFUSALS[refusal].handshake_status
        p.server.faults.handshake_hang = REFUSALS[refusal].handshake_hang
        await until(lambda: p.pool.figures.failed_dials or p.pool.figures.dialling)
        assert await said > 0
        assert list(p.pool.connections.values()) == [connection]
        assert connection.entry.state is ConnectionState.OPEN
        assert (p.server.counts["context_created"], p.pool.figures.second_tries) == (1, 0)


async def test_a_connection_that_was_silent_as_long_gets_no_second_try() -> None:
    """The idle connection may have died as well, and the limit leaves no other: the first try goes on.

    Fails if the second try retires the connection that it was meant for.
    """
    async with pair(timings=EAGER, max_contexts=1, max_connections=2) as p:
        for stream in await asyncio.gather(p.acquire(), p.acquire()):
            await stream.release()
        await p.settled()
        p.server.faults.create_delay = 1.5
        assert await p.say() > 0
        assert p.pool.figures.second_tries == 0
        assert [each.entry.state for each in p.pool.connections.values()] == [ConnectionState.OPEN] * 2


async def test_no_second_try_while_other_connections_are_slow_too() -> None:
    """A server that is slow for everybody gets no create twice."""
    async with pair(faults=Faults(create_delay=2.0), timings=EAGER, max_contexts=1) as p:
        streams = await asyncio.gather(*(p.acquire() for _ in range(6)))
        assert p.server.counts["context_created"] == 6
        assert p.pool.figures.second_tries == 0
        for stream in streams:
            await stream.release()


async def test_second_tries_are_few() -> None:
    """Five creates on one connection are slow: one goes out again, and the others wait."""
    async with pair(faults=Faults(create_delay=2.0), timings=EAGER) as p:
        streams = await asyncio.gather(*(p.acquire() for _ in range(5)))
        assert p.pool.figures.second_tries == 1
        assert p.server.counts["context_created"] == 6
        for stream in streams:
            await stream.release()


async def test_no_second_try_while_another_connection_has_just_been_slow() -> None:
    """A late answer on another connection, after the create was sent, says that the server is slow."""
    async with pair(timings=EAGER, max_contexts=1) as p:
        first = await p.acquire()
        (connection,) = p.pool.connections.values()
        connection.create_seconds, connection.created_at = 1.0, NEVER
        p.server.faults.create_delay = 1.5
        second = await p.acquire()
        assert p.pool.figures.second_tries == 0
        for stream in (first, second):
            await stream.release()
