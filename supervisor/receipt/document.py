"""The document: what is printed, written to a file and judged at the end of a stop."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import version
from typing import Any, Literal

from lastcall.supervisor.receipt.ledger import JobEntry, Ledger
from lastcall.supervisor.receipt.record import StopRecord
from lastcall.worker.base.exit_codes import Exit

# The version of the document's fields; docs/operations.md lists them.
SCHEMA = 1

Outcome = Literal["clean", "cut", "forced", "gave_up", "fault"]


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
        "deadlines": record.deadlines,
        "asked": record.asked,
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
                **_times(record, entry),
                **{
                    name: value
                    for name in ("process", "successor", "handover", "callbacks")
                    if (value := getattr(entry, name))
                },
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


def _times(record: StopRecord, entry: JobEntry) -> dict[str, float]:
    """Return when a job ended and was asked to shut down, in seconds after the beginning of the stop."""
    began = record.started_at
    if began is None:
        return {}
    times = {"ended_after": None if entry.fate is None else entry.accepted_at + entry.seconds - began}
    times["asked_after"] = None if entry.asked_at is None else entry.asked_at - began
    return {name: round(seconds, 3) for name, seconds in times.items() if seconds is not None}


@functools.cache  # the versions are read from files, which takes milliseconds of the end of a stop
def versions() -> dict[str, str]:
    """Return the versions that matter when a receipt is read later."""
    return {
        "lastcall": version("lastcall"),
        "livekit-agents": version("livekit-agents"),
        "python": platform.python_version(),
    }
