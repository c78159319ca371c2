"""The status document: the same for `/status` and for `lastcall status --json`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from worker.clock import now

from .fleet import Fleet
from .shutdown import Countdown, PhaseClock
from .slot import Slot
from .states import Phase

SCHEMA = 1


@dataclass(slots=True, kw_only=True)
class View:
    """What the document is made from."""

    fleet: Fleet
    clock: PhaseClock
    countdown: Countdown | None = None

    @property
    def phase(self) -> Phase:
        phase = self.clock.phase
        if phase is Phase.STARTING and self.fleet.accepts:
            return Phase.RUNNING
        return phase

    def unready_because(self) -> str:
        """Return why no dispatch would be accepted right now; empty when one would."""
        if self.countdown is not None:
            return f"stopping ({self.phase.text}): {self.countdown.reason}"
        if self.fleet.accepts:
            return ""
        states = ", ".join(f"slot {slot.number} {slot.state.value}" for slot in self.fleet.slots)
        return f"no worker is registered and accepts jobs: {states}"

    def document(self) -> dict[str, Any]:
        """Return the status, ready for JSON."""
        countdown = self.countdown
        return {
            "schema": SCHEMA,
            "version": version("lastcall"),
            "pid": os.getpid(),
            "phase": self.phase.text,
            "reason": countdown.reason if countdown else "",
            "grace_left_s": round(countdown.grace_left, 1) if countdown else None,
            "totals": {"started": self.fleet.ledger.started, **self.fleet.ledger.totals},
            "slots": [_row(slot) for slot in self.fleet.slots],
            "companions": [],
        }


def _row(slot: Slot) -> dict[str, Any]:
    beat = slot.beat
    return {
        "slot": slot.number,
        "generation": slot.generation,
        "state": slot.state.value,
        "pid": slot.pid,
        "worker_id": slot.worker_id or None,
        "agent_name": slot.agent_name,
        "since_s": round(now() - slot.since, 1),
        "lag_ms": beat.lag_ms if beat else None,
        "load": beat.load if beat else None,
        "rss_bytes": beat.rss_bytes if beat else None,
        "restarts": slot.restarts,
        "last_exit": slot.last_exit or None,
        "jobs": [
            {
                "id": job.id,
                "room": job.room,
                "dispatch_id": job.dispatch_id,
                "pid": job.pid,
                "age_s": round(now() - job.accepted_at, 1),
            }
            for job in slot.jobs
        ],
    }
