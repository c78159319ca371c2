"""The memory of each generation and of each image, as the kernel divides it among processes.

Resident memory counts a page in each process that has it, so the workers of one image seem to need many times
what they do. Here a shared page counts in parts (PSS), or not at all (private). The kernel walks the page
tables of a process for that, and the process waits meanwhile when it changes them. So a look is taken only
when somebody asks, at most every few seconds unless a process is new, and never in a stop. It is taken in a
thread: a process that hangs in the kernel may keep the look from its end, and then the last figures stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Set

from lastcall.supervisor.fleet.fleet import Fleet
from lastcall.worker.base import memory
from lastcall.worker.base.clock import now
from lastcall.worker.base.records import dataclass

# Seconds for which the figures of a look count for a scrape and for recycling.
LOOK_EVERY = 30.0
# Seconds for which they count for a person, who asks again after a while. Ours: `status --watch` asks twice a
# second, and would have the page tables of live calls walked as often.
LOOK_FOR_STATUS_EVERY = 5.0
# Seconds that somebody waits for a look. Ours: one takes some milliseconds a process.
LOOK_WITHIN = 0.5

# A generation by slot and number, and an image by its pid.
Key = tuple[int, int] | int


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of a process and of all below it: the kernel's share of each, and what is private to each.

    `own_private` is what is private to the process itself: it would be free if that process alone ended.
    """

    pss: int
    private: int
    own_private: int


class Footprints:
    """Looks at the processes of one fleet. `total_pss` has that of the supervisor too."""

    def __init__(self, fleet: Fleet) -> None:
        self.looked_at: float | None = None
        self.total_pss = 0
        self._fleet = fleet
        self._found: dict[Key, Footprint] = {}
        self._looked_for: Set[Key] = frozenset()
        self._looking: asyncio.Future[None] | None = None

    def of(self, key: Key | None) -> Footprint | None:
        """Return what the last look has found; None for a process that it has not seen."""
        return None if key is None else self._found.get(key)

    def images(self) -> list[Footprint]:
        """Return those of the images; in a reload there are two."""
        return [each for key, each in self._found.items() if isinstance(key, int)]

    async def run(self) -> None:
        """Look every `LOOK_EVERY` for the recycling by memory, while that is configured."""
        while True:
            await self._fleet.changed.until(
                lambda: self._fleet.config.recycle.max_rss_mb and self._fleet.works
            )
            await self.look(LOOK_EVERY)
            await asyncio.sleep(LOOK_EVERY)

    async def look(self, at_most_every: float) -> None:
        """Have figures that are no older than so many seconds, as far as that can be had in time.

        A process that has started since the last look is looked at for its first figures.
        """
        is_fresh = self.looked_at is not None and now() - self.looked_at < at_most_every
        if self._fleet.is_stopping or (is_fresh and self._wanted().keys() <= self._looked_for):
            return
        if self._looking is None or self._looking.done():
            self._looking = self._begin()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_WITHIN):
                await asyncio.shield(self._looking)

    def _wanted(self) -> dict[Key, int]:
        """Return the pids of the processes to look at, with their keys."""
        wanted: dict[Key, int] = {
            (each.slot, each.number): each.pid for each in self._fleet.generations if each.pid is not None
        }
        return wanted | {pid: pid for pid in self._fleet.image_pids}

    def _begin(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        wanted = self._wanted()

        def adopt(found: dict[Key, Footprint], total: int) -> None:
            self._found, self.total_pss, self.looked_at = found, total, now()
            self._looked_for = wanted.keys()
            for each in self._fleet.generations:
                seen = found.get((each.slot, each.number))
                each.private_bytes = None if seen is None else seen.own_private
            end()

        def end() -> None:
            if not done.done():
                done.set_result(None)

        def look() -> None:
            try:
                found = footprints(wanted)
                total = sum(each.pss for each in found.values()) + memory.shares("self").pss
            except OSError:  # no descriptor is left
                tell(end)
            else:
                tell(adopt, found, total)

        def tell(whom: Callable[..., None], *what: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(whom, *what)

        try:
            threading.Thread(target=look, name="footprints", daemon=True).start()
        except RuntimeError:  # no room for a thread
            end()
        return done


def footprints(wanted: dict[Key, int]) -> dict[Key, Footprint]:
    """Return the footprint of each process that can be seen. Blocks."""
    below = memory.processes_below(wanted.values())
    found: dict[Key, Footprint] = {}
    for key, pid in wanted.items():
        own = memory.shares(pid)
        each = [own, *(memory.shares(process.pid) for process in below[pid])]
        if own.pss:
            found[key] = Footprint(
                pss=sum(one.pss for one in each),
                private=sum(one.private for one in each),
                own_private=own.private,
            )
    return found
