"""A pool beside a local Inworld server, and the count of what both left behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lastcall.worker.base.clock import now
from lastcall.worker.inworld.pool.pool import InworldPool
from lastcall.worker.inworld.pool.timings import Timings
from lastcall.worker.local.inworld_server import Faults, InworldServer, Limits, Speech
from tests.support.inworld_stream import Stream, acquire, acquired

CONFIG = {
    "voiceId": "Ashley",
    "modelId": "inworld-tts-2",
    "audioConfig": {"audioEncoding": "PCM", "sampleRateHertz": 24000},
    "autoMode": True,
}
# Short pauses before a retry, and long waits for everything else, because a busy machine is no failure. A
# test of a short wait sets that wait.
QUICK = Timings(
    slow_dial=5.0, outage=0.0, second_try_least=60.0, retry_first=0.02, retry_cap=0.1, aclose=10.0
)
PATIENCE = 30.0


async def until(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Look again and again until the condition holds. Raises TimeoutError."""
    deadline = now() + timeout
    while not condition():
        if now() > deadline:
            raise TimeoutError(f"not so within {timeout} s")
        await asyncio.sleep(0.002)


def sockets() -> int:
    """Return how many sockets this process has."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += os.readlink(entry).startswith("socket:")
        except OSError:
            continue
    return count


@dataclass(slots=True, kw_only=True)
class Pair:
    """A server and a pool of it."""

    server: InworldServer
    pool: InworldPool

    async def say(self, text: str = "Hello there.", timeout: float | None = None) -> int:
        """Speak a text and return how many chunks of audio came."""
        chunks = 0
        async with acquired(self.pool, CONFIG, timeout=timeout) as stream:
            async for frame in stream.speak(text):
                chunks += bool(frame.payload)
        return chunks

    async def acquire(self, timeout: float | None = None, **options: int) -> Stream:
        return await acquire(self.pool, CONFIG, timeout=timeout, **options)

    async def settled(self) -> None:
        """Wait until the server counts no context; the pool must agree."""
        await until(lambda: self.server.open_contexts == 0)
        await until(lambda: self.pool.figures.contexts == 0 and self.pool.figures.waiters == 0)

    def orderly(self) -> None:
        """Assert what the server saw: each context ended before its connection, each of those with 1000.

        Except for a connection that never had a context: its dial was cancelled as the handshake ended.
        """
        assert self.server.events_of("context_cut") == []
        used = {event.connection for event in self.server.events_of("context_created")}
        ends = [e for e in self.server.events_of("connection_closed") if e.connection in used]
        assert {(e.detail["code"], e.detail["clean"]) for e in ends} <= {(1000, True)}, ends


@asynccontextmanager
async def pair(
    *,
    limits: Limits | None = None,
    faults: Faults | None = None,
    speech: Speech | None = None,
    timings: Timings = QUICK,
    is_alone: bool = True,
    is_faulty: bool = False,
    **options: Any,
) -> AsyncIterator[Pair]:
    """Run a server and a pool; at the end no context, connection, task or socket of theirs is left.

    Not `is_alone`: something else in this process may leave tasks and sockets, so they are not counted.
    `is_faulty`: the test has the pool raise what nobody foresaw, which is else a fault that a test must see.
    """
    own = asyncio.current_task()
    before = sockets()
    async with InworldServer(limits=limits, faults=faults, speech=speech) as server:
        async with InworldPool(server.ws_url, server.api_key, timings=timings, **options) as pool:
            yield Pair(server=server, pool=pool)
        await until(lambda: server.open_connections == 0)
        assert is_faulty or pool.faults.count == 0
        assert pool.tasks == {} and pool.connections == {} and not pool.capacity.entries
    if is_alone:
        await until(lambda: asyncio.all_tasks() <= {own})
        await until(lambda: sockets() <= before)


def quick(**changes: float) -> Timings:
    return replace(QUICK, **changes)


async def cancel_at_each_tick(
    operation: Callable[[], Awaitable[object]],
    check: Callable[[], Awaitable[None]],
    *,
    most: int = 400,
) -> int:
    """Start the operation and cancel it after k turns of the loop, for k = 0, 1, … until it ends before.

    Returns how many were cancelled; `check` runs after each.
    """
    for k in range(most):
        task = asyncio.ensure_future(operation())
        for _ in range(k):
            if task.done():
                break
            await asyncio.sleep(0)
        done = not task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()
        await check()
        if done:
            return k
    raise AssertionError(f"not done after {most} turns")


async def many(count: int, pool: Pair) -> None:
    """Have so many callers speak at once; all must succeed."""
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(pool.say())
