"""The close of a pool is in order and on time, whatever is under way. A cancel at any turn leaves nothing."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from lastcall.worker.base.clock import now
from lastcall.worker.inworld.pool.close_report import CloseReport
from lastcall.worker.inworld.pool.errors import ConnectionLost, InworldError, PoolClosed
from lastcall.worker.inworld.pool.pool import InworldPool
from lastcall.worker.local.inworld_server import Faults, InworldServer, Speech
from tests.support.inworld import (
    CONFIG,
    PATIENCE,
    QUICK,
    Pair,
    cancel_at_each_tick,
    pair,
    quick,
    sockets,
    until,
)
from tests.support.inworld_stream import Stream, acquire

SPEAKING = Speech(pace="real-time")
LONG = "This goes on and on. " * 40


async def test_open_contexts_are_cancelled_before_their_connections() -> None:
    """Closed in mid-speech, each context ends first, then each connection with code 1000; the report agrees.

    Fails if connections are closed over open contexts.
    """
    async with pair(speech=SPEAKING) as p:
        streams = await asyncio.gather(*(p.acquire() for _ in range(12)))
        for stream in streams:
            await stream.send_text(LONG)
            await stream.flush()
        report = await p.pool.aclose(now() + PATIENCE)
        assert (report.connections, report.contexts, report.tasks) == ({"closed": 3}, {"closed": 12}, 0)
        assert report.fate == "closed"
        for stream in streams:
            with pytest.raises(PoolClosed):
                async for _ in stream:
                    pass
        await until(lambda: p.server.open_connections == 0)
        assert len(p.server.events_of("cancel_requested")) == 12
    p.orderly()


async def test_waiters_are_failed_at_once() -> None:
    """Callers that wait for a place get PoolClosed at once, before their timeout. Fails if none is woken."""
    async with pair(faults=Faults(closed_delay=0.2), max_connections=1, max_contexts=1) as p:
        await p.acquire()
        waiters = [asyncio.ensure_future(p.acquire(timeout=600.0)) for _ in range(5)]
        await until(lambda: p.pool.figures.waiters == 5)
        closing = asyncio.ensure_future(p.pool.aclose())
        results = await asyncio.gather(*waiters, return_exceptions=True)
        assert all(isinstance(result, PoolClosed) for result in results)
        await closing


@pytest.mark.parametrize("hang", [False, True])
async def test_no_connection_opens_after_the_close(hang: bool) -> None:
    """A handshake under way, slow or hung, is cancelled and joined. Fails if it is left to itself."""
    faults = Faults(handshake_delay=0.1, handshake_hang=hang)
    async with pair(faults=faults, timings=quick(dial=600.0)) as p:
        callers = [asyncio.ensure_future(p.acquire(timeout=600.0)) for _ in range(3)]
        await until(lambda: p.server._transports)
        async with asyncio.timeout(PATIENCE):
            report = await p.pool.aclose(now() + 600.0)
        assert (report.fate, report.connections, report.tasks) == ("closed", {}, 0)
        results = await asyncio.gather(*callers, return_exceptions=True)
        assert all(isinstance(result, PoolClosed) for result in results)
        await until(lambda: not p.server._transports)
        assert p.server.counts["connected"] == 0


async def test_close_amid_everything() -> None:
    """15 closes, each amid speech, finishing contexts, waiters and dials: nothing is left at the server.

    Fails if connections are closed over contexts that are about to end.
    """
    for seed in range(15):
        chance = random.Random(seed)
        async with pair(faults=Faults(handshake_delay=0.005, closed_delay=0.005)) as p:

            async def live(pause: float = chance.random() / 50) -> None:
                try:
                    while True:
                        await p.say("Some words.")
                        await asyncio.sleep(pause)
                except InworldError:
                    return

            tasks = [asyncio.ensure_future(live()) for _ in range(120)]
            await p.server.until(lambda: p.server.counts["context_closed"] > 20, PATIENCE)
            for _ in range(chance.randrange(50)):
                await asyncio.sleep(0)
            report = await p.pool.aclose()
            assert (report.fate, report.tasks) == ("closed", 0), report
            await asyncio.gather(*tasks)
            await until(lambda: p.server.open_connections == 0)
            connected = p.server.counts["connected"]
        p.orderly()
        assert p.server.counts["connected"] == connected


async def test_every_timing_of_release_cancel_and_close() -> None:
    """64 interleavings on one full connection: everybody hears, in time, and the server is left empty."""
    async with InworldServer() as server:
        for release, cancel, close in itertools.product(range(0, 12, 3), repeat=3):
            async with InworldPool(
                server.ws_url, server.api_key, timings=QUICK, max_connections=1, max_contexts=1
            ) as pool:
                holder = await acquire(pool, CONFIG)
                waiters = [asyncio.ensure_future(acquire(pool, CONFIG, timeout=600.0)) for _ in range(3)]
                closing: asyncio.Future[CloseReport] | None = None
                for turn in range(12):
                    if turn == release:
                        holder.cancel()
                    if turn == cancel:
                        waiters[0].cancel()
                    if turn == close:
                        closing = asyncio.ensure_future(pool.aclose())
                    await asyncio.sleep(0)
                assert closing is not None
                async with asyncio.timeout(PATIENCE):
                    report = await closing
                    results = await asyncio.gather(*waiters, return_exceptions=True)
                assert (report.fate, report.tasks) == ("closed", 0)
                kinds = (Stream, PoolClosed, asyncio.CancelledError)
                assert all(isinstance(result, kinds) for result in results), results
            await until(lambda: server.open_connections == 0)
        assert server.events_of("context_cut") == []


async def test_one_unanswered_close_frame_holds_up_no_other() -> None:
    """Of three connections one never answers: the others are closed in order, that one by force, on time.

    Fails if they are closed one after the other, or without a deadline.
    """
    async with pair() as p:
        for stream in await asyncio.gather(*(p.acquire() for _ in range(11))):
            stream.close()
        await p.settled()
        p.server.connections[1]._faults = Faults(ignore_close=True)
        report = await p.pool.aclose(now() + 2.5)
        assert (report.connections, report.fate) == ({"closed": 2, "forced": 1}, "forced")
        await until(lambda: p.server.open_connections == 0)


async def test_contexts_that_never_end_are_forced() -> None:
    """A server that closes no context costs no more than the deadline, and is named."""
    async with pair(faults=Faults(closed_never=True), timings=QUICK) as p:
        for _ in range(6):
            await p.acquire()
        began = now()
        report = await p.pool.aclose(began + 2.5)
        assert report.contexts == {"forced": 6}
        assert report.connections == {"closed": 2}
        assert now() - began < PATIENCE
        await until(lambda: p.server.open_connections == 0)


async def test_a_deadline_that_is_over_closes_all_the_same() -> None:
    """Without any time sockets are taken away; nothing is left."""
    async with pair(speech=SPEAKING) as p:
        for _ in range(6):
            await p.acquire()
        report = await p.pool.aclose(now())
        assert (report.tasks, report.fate) == (0, "forced")
        assert sum(report.connections.values()) == 2


async def test_close_is_shared_and_the_earliest_deadline_holds() -> None:
    """Ten callers get the same report; one that comes later with less time is not kept waiting."""
    async with pair(faults=Faults(closed_never=True)) as p:
        await p.acquire()
        patient = [asyncio.ensure_future(p.pool.aclose(now() + 600.0)) for _ in range(9)]
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            report = await p.pool.aclose(now() + 0.2)
            assert all(each is report for each in await asyncio.gather(*patient))
        assert await p.pool.aclose() is report


async def test_a_cancelled_close_is_cancelled_and_goes_on() -> None:
    """The caller gets its CancelledError, and everything is closed all the same. Fails if it is swallowed."""
    async with pair(faults=Faults(closed_delay=0.1)) as p:
        await p.acquire()
        closing = asyncio.ensure_future(p.pool.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait({closing})
        assert closing.cancelled()
        report = await p.pool.aclose()
        assert (report.contexts, report.tasks) == ({"closed": 1}, 0)
    p.orderly()


async def test_the_end_of_a_cancelled_block_closes_too() -> None:
    """A task cancelled within the pool's block, and once more during its close, leaves nothing."""
    before = sockets()
    async with InworldServer(faults=Faults(closed_never=True, ignore_close=True)) as server:

        async def work() -> None:
            async with InworldPool(server.ws_url, server.api_key, timings=quick(aclose=0.5)) as pool:
                await acquire(pool, CONFIG)
                await asyncio.get_running_loop().create_future()

        for twice in (False, True):
            task = asyncio.ensure_future(work())
            await server.until(lambda: server.open_contexts, PATIENCE)
            task.cancel()
            if twice:
                for _ in range(5):
                    await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait({task})
            assert task.cancelled()
            await server.until(lambda: server.open_connections == 0, PATIENCE)
    await until(lambda: sockets() <= before)


async def test_a_connection_that_is_cancelled_twice_tells_everybody() -> None:
    """However its task ends, no reader waits for ever, no place stays taken, and its socket is closed."""
    async with pair(faults=Faults(ignore_close=True)) as p:
        for turns in range(6):
            streams = [await p.acquire() for _ in range(3)]
            (task,) = p.pool.tasks.values()
            task.cancel()
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            async with asyncio.timeout(PATIENCE):
                results = await asyncio.gather(*(anext(each) for each in streams), return_exceptions=True)
            assert all(isinstance(result, ConnectionLost) for result in results), results
            await p.settled()
            await until(lambda: not p.pool.tasks and p.server.open_connections == 0)


async def test_a_connection_that_is_cancelled_takes_no_waiter_along() -> None:
    """The place that comes free with the connection is not given away: the waiter gets a new connection.

    Fails if the connection still takes contexts while its task ends.
    """
    async with pair(max_connections=1, max_contexts=1) as p:
        first = await p.acquire()
        second = asyncio.ensure_future(p.acquire())
        await until(lambda: p.pool.figures.waiters == 1)
        (task,) = p.pool.tasks.values()
        task.cancel()
        with pytest.raises(ConnectionLost):
            await anext(first)
        async with asyncio.timeout(PATIENCE):
            await (await second).release()
        assert p.server.counts["connected"] == 2
        assert p.pool.figures.retries == 0


async def test_an_error_in_the_block_comes_out_as_it_is() -> None:
    """The pool closes, and does not wrap what its user raised."""
    async with InworldServer() as server:
        with pytest.raises(ZeroDivisionError):
            async with InworldPool(server.ws_url, server.api_key, timings=QUICK) as pool:
                await acquire(pool, CONFIG)
                raise ZeroDivisionError
        await server.until(lambda: server.open_connections == 0, PATIENCE)


# -- cancelled at every turn --------------------------------------------------------------------------------


async def test_acquire_cancelled_at_every_turn_warm() -> None:
    """Wherever an acquire is cancelled, the counts of server and pool go back to zero."""
    async with pair() as p:

        async def operation() -> None:
            (await p.acquire()).cancel()

        assert await cancel_at_each_tick(operation, p.settled) > 3
        await asyncio.gather(*(p.say() for _ in range(100)))
    p.orderly()


async def test_acquire_cancelled_at_every_turn_cold() -> None:
    """The same with the handshake in it: a cancelled caller's dial is gone, and its socket too."""
    async with InworldServer() as server:
        before = sockets()

        async def operation() -> None:
            async with InworldPool(server.ws_url, server.api_key, timings=QUICK) as pool:
                (await acquire(pool, CONFIG)).cancel()

        async def check() -> None:
            await until(lambda: server.open_connections == 0 and sockets() <= before)

        assert await cancel_at_each_tick(operation, check) > 20
        assert server.open_contexts == 0


async def test_speech_cancelled_at_every_turn() -> None:
    """Wherever a speech is cancelled, from acquire to release, nothing stays open."""
    async with pair() as p:
        assert await cancel_at_each_tick(p.say, p.settled) > 5
        assert p.pool.figures.connections == 1
    p.orderly()


async def test_release_cancelled_at_every_turn() -> None:
    """A cancelled release becomes a cancel; the place comes back in every case."""
    async with pair(faults=Faults(closed_delay=0.003)) as p:
        turns, done = 1, False
        while not done:
            stream = await p.acquire()
            task = asyncio.ensure_future(stream.release())
            for _ in range(turns):
                await asyncio.sleep(0)
            done = not task.cancel()
            await asyncio.wait({task})
            assert task.cancelled() is not done
            await p.settled()
            turns += 1
        assert turns > 5
    p.orderly()


async def test_close_cancelled_at_every_turn() -> None:
    """Wherever a close is cancelled, the next one finishes it, and nothing is left at the server."""
    async with InworldServer() as server:
        before = sockets()

        async def operation() -> None:
            async with InworldPool(server.ws_url, server.api_key, timings=QUICK) as pool:
                for _ in range(6):
                    await acquire(pool, CONFIG)
                task = asyncio.ensure_future(pool.aclose())
                for _ in range(turns):
                    await asyncio.sleep(0)
                cancelled = task.cancel()
                await asyncio.wait({task})
                assert task.cancelled() is cancelled
                report = await pool.aclose()
                assert (report.tasks, report.contexts, report.connections) == (
                    0,
                    {"closed": 6},
                    {"closed": 2},
                )
                results.append(cancelled)

        results: list[bool] = []
        turns = 0
        while not results or results[-1]:
            await operation()
            turns += 1
            await until(lambda: server.open_connections == 0 and sockets() <= before)
        assert turns > 3
        assert server.events_of("context_cut") == []


# -- storms -------------------------------------------------------------------------------------------------


async def storm(p: Pair, cancels: int, seed: int, *, may_lose: bool = False) -> None:
    """Cancel so many callers at random turns among others that nobody cancels; these must not fail."""
    chance = random.Random(seed)
    left = cancels
    failed = 0

    async def victim() -> None:
        (await p.acquire(timeout=PATIENCE)).cancel()

    async def harass() -> None:
        nonlocal left
        while left > 0:
            task = asyncio.ensure_future(victim())
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            if task.cancel():
                left -= 1
            await asyncio.wait({task})
            if not task.cancelled() and task.exception() is not None:
                assert isinstance(task.exception(), InworldError)

    async def control() -> None:
        nonlocal failed
        while left > 0:
            try:
                await p.say("Me.", timeout=PATIENCE)
            except InworldError:
                failed += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(60):
            group.create_task(harass())
        for _ in range(20):
            group.create_task(control())
    assert failed == 0 or may_lose


async def test_storm_of_cancellations() -> None:
    """10,000 random cancels among 20 callers that nobody cancels: none of these fails, nothing leaks."""
    async with pair(max_connections=8) as p:
        await storm(p, 10_000, seed=1)
        await p.settled()
        assert p.server.peak_connections <= 8 and p.server.peak_contexts <= 5
        assert not p.server.events_of("context_refused")
        await asyncio.gather(*(p.say() for _ in range(100)))
    p.orderly()


async def test_storm_with_cuts() -> None:
    """The same with connections cut at random: nothing leaks, and afterwards 100 of 100 are served."""
    async with pair(max_connections=8) as p:
        p.server.faults.cut_rate = 0.01
        await storm(p, 2_000, seed=2, may_lose=True)
        p.server.faults.cut_rate = 0.0
        await p.settled()
        await asyncio.gather(*(p.say(timeout=PATIENCE) for _ in range(100)))
        assert p.pool.figures.lost > 0
