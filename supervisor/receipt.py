"""The ledger of jobs, and the receipt of one stop. Pure: nothing here reads a clock or a process."""

from __future__ import annotations

import functools
import platform
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from lastcall.worker.base.exit_codes import Exit

SCHEMA = 1

Fate = Literal["finished", "failed", "cut", "lost"]
Outcome = Literal["clean", "cut", "forced", "gave_up", "fault"]
ResourceFate = Literal["closed", "forced", "leaked"]


@dataclass(slots=True, kw_only=True)
class JobEntry:
    """One accepted job. `fate` is None while it runs."""

    id: str
    room: str
    dispatch_id: str
    slot: int
    generation: int
    accepted_at: float
    pid: int | None = None
    fate: Fate | None = None
    seconds: float = 0.0


class Ledger:
    """Every job the workers told of, running ones by slot and generation; and the totals."""

    def __init__(self) -> None:
        self.running: dict[tuple[int, int, str], JobEntry] = {}
        self.started = 0
        self.totals: dict[str, int] = {"finished": 0, "failed": 0, "cut": 0, "lost": 0, "unassigned": 0}
        self._at_stop: list[JobEntry] | None = None

    def start(self, entry: JobEntry) -> bool:
        """Note a job, or its pid when it was noted as accepted before; tell whether it is new."""
        key = (entry.slot, entry.generation, entry.id)
        known = self.running.get(key)
        if known is not None:
            known.pid = entry.pid
            return False
        self.running[key] = entry
        self.started += 1
        if self._at_stop is not None:
            self._at_stop.append(entry)
        return True

    def end(self, slot: int, generation: int, id: str, fate: str, seconds: float) -> None:
        """Note how a job ended. One that the server never assigned was no job of ours."""
        entry = self.running.pop((slot, generation, id), None)
        if entry is None:
            return
        self.totals[fate] += 1
        if fate == "unassigned":
            self.started -= 1
            if self._at_stop is not None and entry in self._at_stop:
                self._at_stop.remove(entry)
            return
        entry.fate = fate  # type: ignore[assignment]  # checked by the key above
        entry.seconds = round(seconds, 3)

    def lose(self, slot: int, generation: int, now: float, *, cut: Collection[str] = ()) -> int:
        """Note that a worker is gone, with whatever it still ran; return how many jobs that were.

        `cut` are the jobs that were ended with it on purpose; of the others nobody knows how they ended.
        """
        gone = [
            entry for entry in self.running.values() if (entry.slot, entry.generation) == (slot, generation)
        ]
        for entry in gone:
            fate = "cut" if entry.id in cut else "lost"
            self.end(slot, generation, entry.id, fate, now - entry.accepted_at)
        return len(gone)

    def of(self, slot: int, generation: int) -> list[JobEntry]:
        """Return the running jobs of one worker."""
        return [e for e in self.running.values() if (e.slot, e.generation) == (slot, generation)]

    def begin_stop(self) -> None:
        """From now on remember every job: those that run, and those already accepted that are yet to tell."""
        if self._at_stop is None:
            self._at_stop = list(self.running.values())

    @property
    def at_stop(self) -> list[JobEntry]:
        return self._at_stop or []


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceEntry:
    """How one resource of one worker, or of the supervisor, ended."""

    name: str
    fate: ResourceFate
    slot: int | None = None
    counts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class StopRecord:
    """What a stop has seen so far; becomes the receipt at its end."""

    reason: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    resources: list[ResourceEntry] = field(default_factory=list)
    unacknowledged: list[int] = field(default_factory=list)
    killed: list[dict[str, Any]] = field(default_factory=list)
    swept: int = 0
    left: int = 0
    gave_up: bool = False
    fault: str = ""
    config_error: str = ""
    seconds: float = 0.0


def judge(record: StopRecord, ledger: Ledger) -> tuple[Outcome, Exit]:
    """Return the outcome and the exit code: the worst thing that this stop did."""
    if record.config_error:
        return "fault", Exit.CONFIG
    if record.fault:
        return "fault", Exit.FAULT
    if any(entry.fate in ("cut", "lost") for entry in ledger.at_stop):
        outcome: Outcome = "cut"
    elif record.killed or record.left or any(r.fate != "closed" for r in record.resources):
        outcome = "forced"
    else:
        outcome = "clean"
    if record.gave_up:
        return "gave_up", Exit.GAVE_UP
    return outcome, Exit.CLEAN if outcome == "clean" else Exit.FORCED


def write(record: StopRecord, ledger: Ledger, *, grace: float, pid: int) -> dict[str, Any]:
    """Return the receipt of a finished stop, ready for JSON."""
    outcome, code = judge(record, ledger)
    return {
        "schema": SCHEMA,
        "reason": record.reason,
        "outcome": outcome,
        "exit_code": int(code),
        "pid": pid,
        "grace": grace,
        "seconds": round(record.seconds, 3),
        "phases": {name: round(seconds, 3) for name, seconds in record.phases.items()},
        "totals": {"started": ledger.started, **ledger.totals},
        "jobs": [
            {
                "id": entry.id,
                "room": entry.room,
                "dispatch_id": entry.dispatch_id,
                "slot": entry.slot,
                "generation": entry.generation,
                "seconds": entry.seconds,
                "fate": entry.fate,
            }
            for entry in ledger.at_stop
        ],
        "resources": [
            {
                "name": r.name,
                "fate": r.fate,
                "counts": r.counts,
                **({} if r.slot is None else {"slot": r.slot}),
            }
            for r in record.resources
        ],
        "fence_unacknowledged": record.unacknowledged,
        "killed": record.killed,
        "swept": record.swept,
        "left": record.left,
        "fault": record.fault or record.config_error,
        "versions": versions(),
    }


@functools.cache  # reads files, some milliseconds that the end of a stop has better use for
def versions() -> dict[str, str]:
    """Return the versions that matter when a receipt is read later."""
    return {
        "lastcall": version("lastcall"),
        "livekit-agents": version("livekit-agents"),
        "python": platform.python_version(),
    }
