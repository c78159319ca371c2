"""The log for people: the events that they read in other words, or do not read.

The JSON log has every event under its name and with all keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lastcall.supervisor.logs import Text
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.plurals import counted


def receipt_sentence(receipt: Mapping[str, Any]) -> str:
    """Return the outcome of a stop in one line.

    A wrong target is not said again: it stands in the line of the failed slot, and in the last line of all.
    """
    has_fault = receipt["fault"] and receipt["exit_code"] != Exit.CONFIG
    return "; ".join(
        [
            f"receipt: {receipt['outcome']}, exit code {receipt['exit_code']},"
            f" {receipt['seconds']:.1f} s of {receipt['grace']:g} s",
            _jobs(receipt["jobs"]),
            f"{_forced(receipt)}processes left {receipt['left']}",
            *([f"fault: {receipt['fault']}"] if has_fault else []),
        ]
    )


def _jobs(jobs: list[dict[str, Any]]) -> str:
    fates = Counter(str(job["fate"]).replace("_", " ") for job in jobs)
    ends = ", ".join(f"{count} {fate}" for fate, count in fates.items())
    was = "was" if len(jobs) == 1 else "were"
    return f"{counted(len(jobs), 'job')} {was} running when the stop began{ends and f': {ends}'}"


def _forced(receipt: Mapping[str, Any]) -> str:
    counts = {"killed": len(receipt["killed"]), "swept": receipt["swept"]}
    return "".join(f"processes {what} {count}, " for what, count in counts.items() if count)


def _started(event: dict[str, Any]) -> str:
    take = event.pop
    return (
        f"lastcall {take('lastcall')} runs {take('target')}: {counted(take('workers'), 'worker')},"
        f" grace {take('grace'):g} s, pid {take('pid')}, http {take('http')}, control {take('control')}"
        f" (livekit-agents {take('livekit-agents')}, Python {take('python')})"
    )


def _stopping(event: dict[str, Any]) -> str:
    jobs = event.pop("jobs")
    ends = {0: "no job runs", 1: "1 job ends by itself"}.get(jobs, f"{jobs} jobs end by themselves")
    return (
        f"stopping ({event.pop('reason')}): no new job is accepted, {ends}, grace {event.pop('grace_s'):g} s"
    )


# One line for each thing that happens, and none for a state that follows from the one before.
SENTENCES: Mapping[str, Text] = MappingProxyType(
    {
        "supervisor started": _started,
        "slot starting": None,
        "slot draining": None,
        "slot closing": None,
        "slot stopped": None,
        "companion starting": None,
        "companion draining": None,
        "companion closing": None,
        "companion stopped": None,
        "ready": None,
        "stop fencing": _stopping,
        "stop draining": None,
        "stop closing": None,
        "stop sweeping": None,
        "stop stopped": None,
        "receipt": lambda event: receipt_sentence(event.pop("receipt")),
    }
)
