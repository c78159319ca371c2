"""Close the resources of a process in order, bounded, once, and take a census of how that went."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from lastcall.worker.base.clock import now
from lastcall.worker.base.wire import Counts, ResourceFate

CloseFunction = Callable[[float], Awaitable[Counts]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """How one resource ended. `counts` is what it was made of, by fate, when it can say so."""

    name: str
    fate: ResourceFate
    seconds: float
    counts: Counts = field(default_factory=dict)


class Resources:
    """Functions that close, run in the reverse of the order in which they joined, under one deadline.

    Each gets the absolute deadline and returns its counts. One that fails or overruns is `forced` and does
    not keep the others from their turn. Closing again, also while the first is under way, returns the
    same census.
    """

    def __init__(self) -> None:
        self._functions: list[tuple[str, CloseFunction]] = []
        self._census: asyncio.Future[list[Closed]] | None = None

    def join(self, name: str, close: CloseFunction) -> None:
        """Have `close` run at the end, before everything that joined earlier."""
        if self._census is not None:
            raise RuntimeError(f"{name!r} joined after the close had begun")
        self._functions.append((name, close))

    async def aclose(self, deadline: float) -> list[Closed]:
        """Close everything and say how it went. Idempotent, safe to call concurrently."""
        if self._census is not None:
            return await asyncio.shield(self._census)
        self._census = asyncio.get_running_loop().create_future()
        census: list[Closed] = []
        try:
            while self._functions:
                name, close = self._functions.pop()
                census.append(await _close(name, close, deadline))
        finally:
            self._census.set_result(census)
        return census


async def _close(name: str, close: CloseFunction, deadline: float) -> Closed:
    began = now()
    counts: Counts = {}
    fate: ResourceFate = "closed"
    try:
        async with asyncio.timeout(max(0.0, deadline - began)):
            counts = await close(deadline)
    except TimeoutError:
        fate = "forced"
    except Exception as error:  # a foreign closer may raise anything; its fate says that it did
        fate = "forced"
        counts = {"errors": {type(error).__name__: 1}}
    return Closed(name=name, fate=fate, seconds=now() - began, counts=counts)
