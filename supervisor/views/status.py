"""The status document: the same for `/status` and for `lastcall status --json`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from lastcall.supervisor.fleet.fleet import Fleet
from lastcall.supervisor.fleet.generation import Generation
from lastcall.supervisor.fleet.operations import Operations
from lastcall.supervisor.fleet.slot import Slot
from lastcall.supervisor.fleet.stalls import Watch
from lastcall.supervisor.inworld_broker import Companion
from lastcall.supervisor.outputs import Outputs
from lastcall.supervisor.shutdown import Shutdown
from lastcall.worker.base.clock import now

SCHEMA = 1


@dataclass(slots=True, kw_only=True)
class Status:
    """The state of a supervisor, as it is shown."""

    fleet: Fleet
    shutdown: Shutdown
    operations: Operations
    watch: Watch
    companion: Companion | None
    outputs: Outputs

    def unready_because(self) -> str:
        """Return why no dispatch would be accepted right now; empty when one would."""
        stop = self.shutdown.stop
        if stop is not None:
            return f"stopping ({self.shutdown.phase.text}): {stop.reason}"
        if self.fleet.accepts:
            return ""
        if self.fleet.is_held:
            return "on hold; `lastcall release` ends it"
        states = ", ".join(f"slot {slot.number} {slot.state.value}" for slot in self.fleet.slots)
        return f"no worker is registered and accepts jobs: {states}"

    def document(self) -> dict[str, Any]:
        """Return the status, ready for JSON."""
        stop = self.shutdown.stop
        return {
            "schema": SCHEMA,
            "version": version("lastcall"),
            "pid": os.getpid(),
            "phase": self.shutdown.phase.text,
            "reason": stop.reason if stop else "",
            "grace_left_s": round(stop.grace_left, 1) if stop else None,
            "held": self.fleet.is_held,
            "workers": self.operations.wanted,
            "totals": {"started": self.fleet.ledger.started, **self.fleet.ledger.totals},
            "slots": [
                _row(slot, generation)
                for slot in self.fleet.slots
                for generation in sorted(slot.generations, key=lambda each: each.number)
            ],
            "companions": [] if self.companion is None else [self.companion.document()],
            "operations": [operation.document() for operation in self.operations.recent],
        }


def _row(slot: Slot, generation: Generation) -> dict[str, Any]:
    beat = generation.reports.beat
    return {
        "slot": slot.number,
        "generation": generation.number,
        "state": generation.state.value,
        "pid": generation.pid,
        "worker_id": generation.reports.worker_id or None,
        "agent_name": generation.reports.agent_name,
        "since_s": round(now() - generation.since, 1),
        "lag_ms": beat.lag_ms if beat else None,
        "load": beat.load if beat else None,
        "rss_bytes": beat.rss_bytes if beat else None,
        "restarts": slot.restarts.total(),
        "last_exit": slot.last_exit or None,
        "jobs": [
            {
                "id": job.id,
                "room": job.room,
                "dispatch_id": job.dispatch_id,
                "pid": job.pid,
                "age_s": round(now() - job.accepted_at, 1),
            }
            for job in generation.jobs
        ],
    }
