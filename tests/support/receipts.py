"""Receipts for tests of pictures."""

from __future__ import annotations

from typing import Any

# A room whose name would run a script in a page that does not escape it.
HOSTILE = "<img src=x onerror='harmed=1'>"


def job(id: str, room: str, seconds: float, fate: str | None, **more: Any) -> dict[str, Any]:
    """Return a job as a receipt has it."""
    return {"id": id, "room": room, "slot": 0, "generation": 1, "seconds": seconds, "fate": fate, **more}


def cut_stop(**more: Any) -> dict[str, Any]:
    """Return the receipt of a stop of 38.2 s that has cut one of four jobs, with `more` keys."""
    return {
        "schema": 1,
        "reason": "SIGTERM",
        "outcome": "cut",
        "exit_code": 75,
        "pid": 7,
        "at": "2026-01-02T03:04:05Z",
        "grace": 60.0,
        "seconds": 38.2,
        "phases": {"fencing": 0.01, "draining": 36.99, "closing": 1.0, "sweeping": 0.2},
        "deadlines": {
            "fence": 2.0,
            "drain": 37.0,
            "close": 57.0,
            "terminate": 58.0,
            "kill": 60.0,
            "end": 60.0,
        },
        "asked": [{"for": "stop", "after": 0.0}],
        "totals": {"started": 10, "finished": 9, "cut": 1, "failed": 0},
        "jobs": [
            job("AJ_1", "r0", 20.0, "finished", ended_after=12.2),
            job("AJ_2", "a long room", 120.0, "cut", ended_after=38.0, asked_after=37.0),
            job("AJ_3", HOSTILE, 4.0, "finished", ended_after=6.0),
            job("AJ_4", "会議室", 10.0, "finished", ended_after=0.3, process="killed"),
        ],
        "resources": [{"name": "livekit", "fate": "closed", "counts": {}, "slot": 0}],
        "fence_unacknowledged": [],
        "killed": [],
        "swept": 1,
        "left": 0,
        "fault": "",
        "versions": {"lastcall": "0.2.0"},
        **more,
    }
