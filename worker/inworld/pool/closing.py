"""The close of a pool, in order and on time.

    refuse new contexts, fail waiters, stop dials, cancel contexts      at once
    wait until the server has ended each context                        until contexts_at
    close each connection with code 1000, as soon as it has none        until deadline
    take the sockets away from those that do not answer                 at the deadline
    join every task

`begin` is the first line and happens between two turns of the loop; nothing can slip in. `carry_out` is the
rest; the deadline may move towards now while it runs.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from lastcall.worker.base.condition import Condition
from lastcall.worker.inworld.pool.connection import Connection
from lastcall.worker.inworld.pool.context import Context
from lastcall.worker.inworld.pool.errors import PoolClosed
from lastcall.worker.inworld.pool.places import Line, Slots

# Of the time for the close, what is kept for the closing handshakes, at most.
GOODBYE = 1.0
SHARE = 0.4
# Tasks whose sockets are gone need a few turns of the loop, and a busy machine for those.
JOIN = 0.25


class Pool(Protocol):
    """What is to be closed."""

    slots: Slots
    changed: Condition
    connections: dict[Line, Connection]
    waiting: dict[Context, float]
    tasks: dict[Line, asyncio.Task[None]]
    close_at: float | None

    def retire(self, line: Line) -> None: ...
    def end_line(self, line: Line) -> None: ...


def begin(pool: Pool) -> None:
    """Let nothing new begin, and ask everything to end."""
    for context in list(pool.waiting):
        context.fail(PoolClosed("the Inworld pool is closing"))
    for line in list(pool.slots.lines):
        connection = pool.connections.get(line)
        if connection is None:
            pool.end_line(line)
            continue
        for context in list(connection.contexts.values()):
            context.fail(PoolClosed("the Inworld pool is closing"))
        pool.retire(line)


async def carry_out(pool: Pool, began: float) -> None:
    """See it through; afterwards no task of a connection is left, or the census says so."""

    def deadline() -> float:
        assert pool.close_at is not None
        return pool.close_at

    def contexts_at() -> float:
        return deadline() - min(GOODBYE, SHARE * max(0.0, deadline() - began))

    await pool.changed.until(lambda: not pool.tasks or not _contexts(pool), contexts_at)
    for connection in list(pool.connections.values()):
        pool.slots.close(connection.line)
        connection.close(deadline())
    await pool.changed.until(lambda: not pool.tasks, deadline)
    for connection in list(pool.connections.values()):
        connection.close(deadline())  # it may have moved
    for task in list(pool.tasks.values()):
        task.cancel()
    if pool.tasks:
        await asyncio.wait(list(pool.tasks.values()), timeout=JOIN)


def _contexts(pool: Pool) -> int:
    return sum(len(connection.contexts) for connection in pool.connections.values())
