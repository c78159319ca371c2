"""The pool's streams: each way in which one goes wrong has a defined end, and costs no other."""

from __future__ import annotations

import asyncio

import pytest

from lastcall.worker.inworld.pool.connection import MAX_UNSENT
from lastcall.worker.inworld.pool.errors import ConnectionLost, ContextError, InworldError, Overflow, Silent
from lastcall.worker.inworld.pool.lifecycles import ConnectionState
from lastcall.worker.inworld.pool.protocol import Action, Kind, send_text
from lastcall.worker.local.inworld_server import Faults, Speech
from tests.support.inworld import CONFIG, PATIENCE, many, pair, quick, until

LONG = "This goes on and on. " * 40


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
    """One malformed frame retires a connection and spares its contexts, and a few end the connection.

    Fails if the connection is kept.
    """
    async with pair() as p:
        p.server.faults.malformed = kind  # type: ignore[assignment]  # one of its literals
        stream = await p.acquire()
        (connection,) = p.pool.connections.values()
        assert connection.entry.state is ConnectionState.RETIRED
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
    """A context that the server never closes fails. The others go on, and then the connection is closed.

    Fails if only the pool forgets the context: the server still counts the context.
    """
    timings = quick(silence=0.6, cancel=0.6, cancel_hint=0.2)
    async with pair(speech=Speech(pace="real-time"), timings=timings) as p:
        p.server.faults.cancel = "ignored"
        other = await p.acquire()
        p.server.faults.closed_never = True
        with pytest.raises(Silent):
            await p.say()
        (connection,) = p.pool.connections.values()
        assert connection.entry.state is ConnectionState.RETIRED
        await other.send_text("I am still served.")
        await other.flush()
        assert (await anext(other)).kind is Kind.AUDIO
        p.server.faults.closed_never = False
        fresh = await p.acquire()
        assert p.server.counts["connected"] == 2
        other.close()
        fresh.close()
        await until(lambda: connection.entry.state is ConnectionState.GONE)


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


@pytest.mark.parametrize("cancel", ["ignored", "error", "top-level"])
async def test_a_server_that_knows_no_cancel_is_asked_to_close(cancel: str) -> None:
    """The place comes back by close_context then, and the connection stays."""
    async with pair(max_connections=1, max_contexts=1, timings=quick(cancel=PATIENCE, cancel_hint=0.1)) as p:
        p.server.faults.cancel = cancel  # type: ignore[assignment]  # one of its literals
        (await p.acquire()).cancel()
        await (await p.acquire(timeout=PATIENCE)).release()
        assert p.server.counts["connected"] == 1
        assert len(p.server.events_of("close_requested")) == 2


async def test_an_error_without_a_context_is_the_unanswered_cancels() -> None:
    """A create that waits beside a cancel is not failed for it, and the place of the cancel comes back.

    Fails if the error is given to the create. Once the cancel is answered, errors are the create's again.
    """
    async with pair(faults=Faults(cancel="top-level"), timings=quick(create=600.0), max_connections=1) as p:
        first = await p.acquire()
        p.server.faults.create_delay = 0.5
        waiting = asyncio.ensure_future(p.acquire())
        await until(lambda: p.server.counts["context_created"] == 2)
        first.cancel()
        stream = await waiting
        assert [frame async for frame in stream.speak("I am served.")]
        await p.settled()
        assert [e.detail["message"] for e in p.server.events_of("error")] == ["unknown payload"]
    p.orderly()


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
    """The server drops an idle connection, and a new connection serves the next caller."""
    async with pair() as p:
        for _ in range(3):
            await p.say()
            p.server.cut_connections()
            await p.say()
            await p.server.close_connections(1001)
            await p.say()


async def test_a_peer_that_does_not_read_is_given_up() -> None:
    """A full buffer makes the sender wait, and then fail. Fails without a bound, or without a deadline."""
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
        await until(lambda: connection.entry.state is ConnectionState.GONE)
        p.server.faults.stop_reading = False
        await p.say()


async def test_a_reader_that_does_not_read_is_told() -> None:
    """Unread audio is bounded; the context is cancelled, and others of its connection go on."""
    async with pair() as p:
        slow, other = await p.acquire(max_unread=50_000), await p.acquire()
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

        class Owner:
            def on_frame(self, frame: object, context: object) -> None:
                raise AssertionError("no frame can come")

            def on_end(self, error: InworldError | None, frame: object, context: object) -> None:
                seen.append(error)

        context = p.pool.start(CONFIG, Owner())
        for _ in range(100):
            p.pool.send(context, Action.TEXT, send_text("x" * 1000))
        assert len(seen) == 1 and isinstance(seen[0], Overflow)
        assert p.pool.figures.waiters == 0
