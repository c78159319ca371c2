"""After the end of a generation: how to take its exit, what it left behind, and what explains it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable
from typing import Any

from lastcall.supervisor.fleet.worker_view import WorkerView
from lastcall.supervisor.processes import cgroup, descendants
from lastcall.supervisor.processes.reaper import ExitStatus
from lastcall.worker.base.clock import now
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.process import TRACKER_ENDS_WITHIN

# Seconds for which a generation waits until its sweep is done. Ours: most processes die of SIGKILL within
# milliseconds. One that takes longer does not hold up the next worker; the end of a stop counts what is left.
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
    kills = cgroup.oom_kills()
    if kills is not None and oom_kills_before is not None and kills > oom_kills_before:
        facts["oom_kills_meanwhile"] = kills - oom_kills_before
    words = b"\n".join(last_lines).decode(errors="replace")
    if words and not reports.fault:
        facts["last_lines"] = words
    return facts


async def sweep(
    mark: str, known_pids: set[int], swept: descendants.Swept, *, unmarked: Callable[[], bool]
) -> int:
    """Kill what a worker left behind; return how many programs that were, those left out that `swept` has.

    `mark` is that of the worker's descendants. `unmarked` says whether a process that carries no mark,
    because it has cleared its environment, can only be one of them.
    """
    programs = 0
    began = now()
    due = began + SWEEP_WITHIN
    while True:
        adopted = descendants.adopted(known_pids)
        if not adopted:
            return programs
        found = descendants.marked(adopted, mark, unmarked=unmarked())
        if not found:
            return programs
        programs += swept.add(found)
        descendants.kill(found, spares_trackers=now() < began + TRACKER_ENDS_WITHIN)
        if now() >= due:
            return programs
        await asyncio.sleep(LOOK_AGAIN_AFTER)
