"""The pool behind a network that is slow, or that ends at any byte."""

from __future__ import annotations

import asyncio

from lastcall.worker.inworld.pool.errors import InworldError
from tests.support.inworld import CONFIG, PATIENCE, pair, quick, until
from tests.support.inworld_stream import acquire
from tests.support.slow_network import proxied


async def test_a_slow_network_only_slows() -> None:
    """Frames that arrive a few bytes at a time are whole: 20 callers are served, the close is in order."""
    async with pair() as p, proxied(p.server.port) as proxy:
        p.pool._connections.url = f"ws://127.0.0.1:{proxy.port}/"
        async with asyncio.timeout(60):
            heard = await asyncio.gather(*(p.say("Hi.", timeout=60.0) for _ in range(20)))
            assert heard == [2] * 20
            report = await p.pool.aclose()
        assert report.fate == "closed"
    p.orderly()


async def test_a_connection_may_end_at_any_byte() -> None:
    """Cut within the handshake or any frame after it: the caller is told or served, and nothing is kept."""
    async with pair(timings=quick(retry_cap=0.02)) as p, proxied(p.server.port) as proxy:
        p.pool._connections.url = f"ws://127.0.0.1:{proxy.port}/"
        proxy.piece = 4096
        for cut in range(0, 560, 7):
            proxy.cut_after = cut
            cuts = proxy.cuts
            caller = asyncio.ensure_future(p.say("Hi.", timeout=PATIENCE))
            await until(lambda cuts=cuts: proxy.cuts > cuts)  # type: ignore[misc]  # mypy can't infer it
            proxy.cut_after = None
            try:
                await caller
            except InworldError:
                await p.say("Hi.", timeout=PATIENCE)  # it was cut in mid-stream; the next is served
            for connection in list(p.pool.connections.values()):
                p.pool._connections.close(connection.entry)
            await until(lambda: not p.pool.tasks)
            await p.settled()
        stream = await acquire(p.pool, CONFIG)
        await stream.release()
