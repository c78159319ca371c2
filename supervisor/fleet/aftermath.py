"""After the end of a generation: how to take its exit, what it left behind, and what explains it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lastcall.supervisor.fleet.worker_view import WorkerView
from lastcall.supervisor.processes import cgroup, descendants
from lastcall.supervisor.processes.reaper import ExitStatus
from lastcall.worker.base.clock import now
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.process import TRACKER_ENDS_WITHIN

# Seconds for a sweep. Ours: most processes die of SIGKILL within milliseconds. The end of a stop counts what
# is left then.
SWEEP_WITHIN = 1.0
# Seconds between two looks of a sweep. Ours: what was killed takes about so long to become a zombie.
LOOK_AGAIN_AFTER = 0.002


def ended_well(status: ExitStatus | None, *, is_opaque: bool) -> bool:
    """Tell whether an end that was asked for is one that a program may well give."""
    if status is None:
        return False
    if is_opaque:  # any exit code will do, and to die of SIGTERM is the default
        return status.code is not None or status.signal is signal.SIGTERM
    return status.code in (Exit.CLEAN, Exit.FORCED)


def post_mortem(
    reports: WorkerView, last_lines: Iterable[bytes], *, oom_kills_before: int | None
) -> dict[str, Any]:
    """Return the facts that explain an unexpected end: age of the last beat, kills for memory, last lines."""
    facts: dict[str, Any] = {}
    if reports.beat is not None:
        facts["last_beat_s"] = round(now() - reports.beat.at, 3)
    if kills := cgroup.oom_kills_since(oom_kills_before):
        facts["oom_kills_meanwhile"] = kills
    words = b"\n".join(last_lines).decode(errors="replace")
    if words and not reports.fault:
        facts["last_lines"] = words
    return facts


class Sweep:
    """Kills what one worker left behind. `programs` counts the programs, without those that `swept` has.

    `mark` is that of the worker's descendants. `unmarked` says whether a process that carries no mark,
    because it has cleared its environment, can only be one of them.
    """

    def __init__(
        self, mark: str, known_pids: set[int], swept: descendants.Swept, *, unmarked: Callable[[], bool]
    ) -> None:
        self.programs = 0
        self._mark = mark
        self._known_pids = known_pids
        self._swept = swept
        self._unmarked = unmarked
        self._began = now()
        self._due = self._began + SWEEP_WITHIN
        self._seen: set[object] = set()

    async def reach_all(self) -> None:
        """Return once a look has found no process that an earlier one had not: all of them are dying."""
        while not self._seen.issuperset(found := self._look()):
            self._seen.update(found)
            if not await self._may_look_again():
                return

    async def finish(self) -> None:
        """Return once nothing is left."""
        while self._look() and await self._may_look_again():
            pass

    async def _may_look_again(self) -> bool:
        if now() >= self._due:
            return False
        await asyncio.sleep(LOOK_AGAIN_AFTER)
        return True

    def _look(self) -> Sequence[object]:
        """Kill what is there, and return it."""
        adopted = descendants.adopted(self._known_pids)
        found = descendants.marked(adopted, self._mark, unmarked=self._unmarked()) if adopted else []
        self.programs += self._swept.add(found)
        descendants.kill(found, spares_trackers=now() < self._began + TRACKER_ENDS_WITHIN)
        return found
