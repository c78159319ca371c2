"""A TCP proxy in front of the local Inworld server: slow, cutting, or forgetting its connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


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
