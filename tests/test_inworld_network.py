"""The pool behind a network that is slow, or that ends at any byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lastcall.worker.inworld.pool.errors import InworldError
from tests.support.inworld import CONFIG, PATIENCE, pair, quick, until
from tests.support.inworld_stream import acquire


class Proxy:
    """Passes bytes on in small pieces; with `cut_after` it cuts a connection after so many of the server.

    `forget` has it swallow all that comes on the connections of this moment, as a firewall does.
    """

    def __init__(self, port: int) -> None:
        self.port = 0
        self.piece = 37
        self.cut_after: int | None = None
        self.cuts = 0
        self._target = port
        self._last = 0
        self._forgotten = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._last += 1
        number = self._last
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            async with asyncio.TaskGroup() as group:
                up = group.create_task(self._pump(number, reader, far_writer, None))
                await self._pump(number, far_reader, writer, self.cut_after)
                up.cancel()
        except ConnectionError:
            return
        finally:
            self._tasks.discard(task)
            for each in (writer, far_writer):
                each.transport.abort()

    async def _pump(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int | None
    ) -> None:
        passed = 0
        while data := await reader.read(self.piece):
            if number <= self._forgotten:
                continue
            if most is not None and passed + len(data) > most:
                writer.write(data[: most - passed])
                self.cuts += 1
                return
            passed += len(data)
            writer.write(data)
            await writer.drain()
            await asyncio.sleep(0)

    def forget(self) -> None:
        self._forgotten = self._last

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


@asynccontextmanager
async def proxied(port: int) -> AsyncIterator[Proxy]:
    proxy = Proxy(port)
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.close()
        await server.wait_closed()


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
