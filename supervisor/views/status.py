"""The status document: the same for `/status` and for `lastcall status --json`."""

from __future__ import annotations

import functools
import os
from importlib.metadata import version
from typing import Any

from lastcall.supervisor.fleet.fleet import Fleet
from lastcall.supervisor.fleet.footprints import LOOK_FOR_STATUS_EVERY, Footprint, Footprints
from lastcall.supervisor.fleet.generation import Generation
from lastcall.supervisor.fleet.operations import Operations
from lastcall.supervisor.fleet.slot import Slot
from lastcall.supervisor.fleet.stalls import Watch
from lastcall.supervisor.inworld_broker import Companion
from lastcall.supervisor.outputs import Outputs
from lastcall.supervisor.receipt import JobEntry
from lastcall.supervisor.shutdown import Shutdown
from lastcall.worker.base.budget import Deadlines
from lastcall.worker.base.clock import now
from lastcall.worker.base.records import dataclass

SCHEMA = 1
# Read once: it takes half a millisecond, a good part of an answer.
version_of = functools.cache(version)
FULL_TEXTS: dict[str, str] = {
    "hold": "on hold; `lastcall release` ends it",
    "cold": "no job process gets ready",
    "cap": "as many jobs as jobs.max_running",
    "load": "livekit-agents' load_threshold",
}


@dataclass(slots=True, kw_only=True)
class Status:
    """The state of a supervisor, as it is shown."""

    fleet: Fleet
    shutdown: Shutdown
    operations: Operations
    watch: Watch
    footprints: Footprints
    companion: Companion | None
    outputs: Outputs

    def unready_because(self) -> str:
        """Return why no worker works; empty when one does, although it may be full at the moment."""
        stop = self.shutdown.stop
        if stop is not None:
            return f"stopping ({self.shutdown.phase.text}): {stop.reason}"
        if self.fleet.works:
            return ""
        states = ", ".join(
            f"slot {slot.number} {_doing(slot)}" + (f" ({slot.last_exit})" if slot.last_exit else "")
            for slot in self.fleet.slots
        )
        return f"no worker is registered and warm: {states}"

    def full(self) -> str:
        """Return why no worker takes a job at this moment; empty when one does, or none works."""
        self.fleet.note_full()
        return ", ".join(FULL_TEXTS[reason] for reason in self.fleet.full_time.reasons)

    async def fresh_document(self) -> dict[str, Any]:
        """Return the status with figures of memory that are no older than some seconds."""
        await self.footprints.look(LOOK_FOR_STATUS_EVERY)
        return self.document()

    def document(self) -> dict[str, Any]:
        """Return the status, ready for JSON. The figures of memory are those of the last look."""
        stop = self.shutdown.stop
        return {
            "schema": SCHEMA,
            "version": version_of("lastcall"),
            "pid": os.getpid(),
            "phase": self.shutdown.phase.text,
            "reason": stop.reason if stop else "",
            "grace_left_s": round(stop.grace_left, 1) if stop else None,
            "drain_left_s": _left(stop.deadlines) if stop else None,
            "stop_s": round(now() - stop.started_at, 1) if stop else None,
            "held": self.fleet.is_held,
            "full": self._full(),
            "workers": self.operations.wanted,
            "image": self._image(),
            "memory": self._memory(),
            "totals": {"started": self.fleet.ledger.started, **self.fleet.ledger.totals},
            "slots": [
                _row(slot, generation, self.footprints.of((slot.number, generation.number)))
                for slot in self.fleet.slots
                for generation in sorted(slot.generations, key=lambda each: each.number)
            ],
            "handover_off": "; ".join(
                f"{name}: {reason}" if name else reason
                for name, reason in self.fleet.shared.handover_off.items()
            )
            or None,
            "companions": [] if self.companion is None else [self.companion.document()],
            "operations": [operation.document() for operation in self.operations.recent],
        }

    def _image(self) -> dict[str, Any] | None:
        image = self.fleet.launcher.image
        if image is None:
            return None
        return {
            "state": image.state,
            "pid": image.pid,
            "reason": image.reason or None,
            "left_out": image.left_out,
        }

    def _memory(self) -> dict[str, Any] | None:
        footprints = self.footprints
        if footprints.looked_at is None:
            return None
        images = footprints.images()
        return {
            "age_s": round(now() - footprints.looked_at, 1),
            "pss_bytes": footprints.total_pss,
            "image_pss_bytes": sum(each.pss for each in images),
            "image_private_bytes": sum(each.private for each in images),
        }

    def _full(self) -> dict[str, Any] | None:
        why, full_time = self.full(), self.fleet.full_time
        if full_time.since is None:
            return None
        since_s = round(now() - full_time.since, 1)
        return {"reasons": list(full_time.reasons), "text": why, "since_s": since_s}


def _doing(slot: Slot) -> str:
    """Return the state of a slot, for people: a start that waits until an image is made is one too."""
    return "starting" if slot.current.is_launching else slot.state.value


def _left(deadlines: Deadlines) -> float:
    """Return the seconds for which calls may still run before they are asked to shut down."""
    return _until(deadlines.drain_at)


def _until(at: float) -> float:
    return round(max(0.0, at - now()), 1)


def _row(slot: Slot, generation: Generation, footprint: Footprint | None) -> dict[str, Any]:
    beat = generation.reports.beat
    return {
        "slot": slot.number,
        "generation": generation.number,
        "state": generation.state.value,
        "pid": generation.pid,
        "worker_id": generation.reports.worker_id or None,
        "agent_name": generation.reports.agent_name,
        "since_s": round(now() - generation.since, 1),
        "start_left_s": None if generation.ready_by is None else _until(generation.ready_by),
        "lag_ms": beat.lag_ms if beat else None,
        "load": beat.load if beat else None,
        "rss_bytes": beat.rss_bytes if beat else None,
        "pss_bytes": footprint.pss if footprint else None,
        "private_bytes": footprint.private if footprint else None,
        "full": generation.full_because or None,
        "process_failures": generation.reports.process_failures,
        "process_failure": generation.reports.process_failure or None,
        "drain_left_s": _left(generation.stopping.deadlines) if generation.stopping.is_asked else None,
        "restarts": slot.restarts.total(),
        "last_exit": slot.last_exit or None,
        "jobs": [
            {
                "id": job.id,
                "room": job.room,
                "dispatch_id": job.dispatch_id,
                "pid": job.pid,
                "age_s": round(now() - job.accepted_at, 1),
                "capsule": _capsule(job),
                "handover": job.handover or None,
                "successor": job.successor or None,
            }
            for job in generation.jobs
        ],
    }


def _capsule(job: JobEntry) -> dict[str, Any] | None:
    """Return how much a job keeps for a successor, and since when; not what. 0 bytes stand for a function."""
    if job.capsule_bytes is None:
        return None
    age_s = round(now() - job.kept_at, 1)
    return {"bytes": job.capsule_bytes, "age_s": age_s, "lacks": job.lacks or None}
