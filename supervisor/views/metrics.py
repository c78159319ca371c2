"""`lastcall_*` metrics, collected from the live state at each scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest

from lastcall.supervisor.fleet.footprints import LOOK_EVERY
from lastcall.supervisor.fleet.operations import OperationVerb
from lastcall.supervisor.fleet.states import SlotState
from lastcall.supervisor.views import families
from lastcall.supervisor.views.status import Status
from lastcall.supervisor.views.worker_metrics import WorkerMetrics
from lastcall.worker.base.clock import now
from lastcall.worker.base.process import rss_bytes
from lastcall.worker.base.wire import AskMetrics, HandoverResult

RESULTS: tuple[HandoverResult, ...] = ("done", "refused", "failed")
VERBS: tuple[OperationVerb, ...] = ("reload", "recycle", "scale", "handover")
# Seconds that a scrape waits for the workers. Ours: Prometheus waits 10 s, a loop answers in a few ms.
WAIT_FOR_WORKERS = 0.3
# How the worker before a restart ended; `Generation.end_kind`, and `left` for one that went unasked.
RESTART_REASONS = ("exited", "killed", "never ready", "not started", "left")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Collector:
    """Turns the state into metric families; nothing is counted twice because nothing is kept here."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        yield from self._slots()
        yield from self._jobs()
        yield from self._operations()
        yield from self._pool()
        stop = self._status.shutdown.stop
        yield families.STOPPING.of(float(stop is not None))
        yield families.GRACE_LEFT.of(stop.grace_left if stop is not None else 0.0)
        dropped = self._status.outputs.dropped
        yield families.DROPPED.by(((stream,), count) for stream, count in dropped.items())
        yield families.MEMORY.of(rss_bytes())

    def _slots(self) -> Iterator[Metric]:
        fleet = self._status.fleet
        generations = list(fleet.generations)
        states = Counter(generation.state for generation in generations)
        yield families.SLOTS.by(((state.value,), states[state]) for state in SlotState)
        yield families.RESTARTS.by(
            ((str(slot.number), reason), slot.restarts[reason])
            for slot in fleet.slots
            for reason in RESTART_REASONS  # each from the start, because `increase` needs a first sample
        )
        alive = [
            ((str(generation.slot), str(generation.number)), beat)
            for generation in generations
            if (beat := generation.reports.beat) is not None and generation.is_alive
        ]
        yield families.LAG.by((label, beat.lag_ms / 1000) for label, beat in alive if beat.lag_ms is not None)
        yield families.LAST_BEAT.by((label, max(0.0, now() - beat.at)) for label, beat in alive)
        yield families.WORKER_MEMORY.by(
            (label, beat.rss_bytes) for label, beat in alive if beat.rss_bytes is not None
        )
        yield from self._memory()
        yield families.ACCEPTING.of(sum(generation.accepts for generation in generations))
        yield families.WANTED.of(self._status.operations.wanted)
        yield families.HELD.of(float(fleet.is_held))
        fleet.note_full()
        yield families.FULL.by(((reason,), seconds) for reason, seconds in fleet.full_time.seconds.items())
        yield families.PROCESS_FAILURES.by(
            ((str(slot.number),), fleet.shared.process_failures[slot.number]) for slot in fleet.slots
        )
        yield families.STALLS.of(self._status.watch.stalls)

    def _memory(self) -> Iterator[Metric]:
        footprints = self._status.footprints
        seen = [
            ((str(generation.slot), str(generation.number)), footprint)
            for generation in self._status.fleet.generations
            if (footprint := footprints.of((generation.slot, generation.number))) and generation.is_alive
        ]
        yield families.WORKER_PSS.by((label, footprint.pss) for label, footprint in seen)
        yield families.WORKER_PRIVATE.by((label, footprint.private) for label, footprint in seen)
        images = footprints.images()
        yield families.IMAGE_PSS.of(sum(each.pss for each in images))
        yield families.IMAGE_PRIVATE.of(sum(each.private for each in images))

    def _jobs(self) -> Iterator[Metric]:
        fleet = self._status.fleet
        yield families.JOBS_RUNNING.by(((str(slot.number),), len(slot.jobs)) for slot in fleet.slots)
        yield families.JOBS_STARTED.of(fleet.ledger.started)
        for fate, family in families.JOBS.items():
            yield family.of(fleet.ledger.count(fate))
        yield families.HANDOVERS.by(((result,), fleet.ledger.handovers[result]) for result in RESULTS)
        yield from self._cuts()
        fences, drains = fleet.shared.fence_seconds, fleet.shared.drain_seconds
        yield families.FENCE.spread(fences.buckets, fences.sum)
        yield families.DRAIN.spread(drains.buckets, drains.sum)

    def _cuts(self) -> Iterator[Metric]:
        """Yield the jobs that a drain may cut, and the time before; a scrape sees both while it can.

        The supervisor knows no job of an opaque program. A 0 would say that none is left to wait for.
        """
        if self._status.fleet.launcher.is_opaque:
            return
        draining = [g for g in self._status.fleet.generations if g.jobs_to_cut]
        left = min((g.stopping.deadlines.drain_at - now() for g in draining), default=0.0)
        yield families.JOBS_TO_CUT.of(sum(len(g.jobs_to_cut) for g in draining))
        yield families.DRAIN_LEFT.of(max(0.0, left))

    def _pool(self) -> Iterator[Metric]:
        companion = self._status.companion
        if companion is None:
            return
        # A broker that starts has told nothing yet, and its counters begin at 0.
        for name, family in families.POOL.items():
            yield family.of(companion.figures.get(name, 0))

    def _operations(self) -> Iterator[Metric]:
        counts = self._status.operations.counts
        yield families.OPERATIONS.by(
            ((verb, result), counts[verb, result]) for verb in VERBS for result in ("done", "failed")
        )


class Metrics:
    """The exposition of one supervisor and its workers."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._registry = CollectorRegistry()
        self._registry.register(Collector(status))

    async def text(self) -> bytes:
        """Return the exposition. A worker that does not answer in time shows its last figures."""
        await self._status.footprints.look(LOOK_EVERY)
        asked = [g for g in self._status.fleet.generations if g.is_alive and g.was_ready and not g.is_opaque]
        for generation in asked:
            generation.reports.metrics_asked += 1
            generation.say(AskMetrics(id=generation.reports.metrics_asked))
        due = now() + WAIT_FOR_WORKERS
        await self._status.fleet.changed.until(
            lambda: all(g.reports.metrics_told >= g.reports.metrics_asked or not g.is_alive for g in asked),
            lambda: due,
        )
        joined = CollectorRegistry()
        joined.register(WorkerMetrics(asked))
        return generate_latest(self._registry) + generate_latest(joined)
