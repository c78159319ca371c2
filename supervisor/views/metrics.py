"""`lastcall_*` metrics, collected from the live state at each scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from lastcall.supervisor.fleet.footprints import LOOK_EVERY
from lastcall.supervisor.fleet.operations import OperationVerb
from lastcall.supervisor.fleet.states import SlotState
from lastcall.supervisor.receipt.ledger import EntryFate
from lastcall.supervisor.views.status import Status
from lastcall.supervisor.views.worker_metrics import WorkerMetrics
from lastcall.worker.base.clock import now
from lastcall.worker.base.process import rss_bytes
from lastcall.worker.base.wire import AskMetrics, HandoverResult

LABELS = ["slot", "generation"]
FATES: tuple[EntryFate, ...] = ("finished", "failed", "cut", "ended_by_server", "handed_over", "lost")
RESULTS: tuple[HandoverResult, ...] = ("done", "refused", "failed")
VERBS: tuple[OperationVerb, ...] = ("reload", "recycle", "scale", "handover")
# Seconds that a scrape waits for the workers. Ours: Prometheus waits 10 s, a loop answers in a few ms.
WAIT_FOR_WORKERS = 0.3
POOL_GAUGES = {
    "connections": "Connections to Inworld, those in their handshake included.",
    "contexts": "Contexts that Inworld counts.",
    "waiters": "Creates that wait for capacity.",
}
# Since the broker of this moment was started.
POOL_COUNTERS = {
    "granted": "Contexts that were given capacity.",
    "wait_seconds": "Time that creates have waited for capacity.",
    "refusals": "Connections that Inworld refused.",
    "retries": "Creates that were sent again on another connection.",
    "second_tries": "Creates that were sent again because the first try was slow.",
    "faults": "Handshakes, connections, contexts and requests that ended by a fault in lastcall.",
    "direct": "TTS objects that went to Inworld beside the pool.",
}
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
        stopping = float(stop is not None)
        yield GaugeMetricFamily("lastcall_stopping", "1 while a stop is under way.", value=stopping)
        left = stop.grace_left if stop is not None else 0.0
        yield GaugeMetricFamily(
            "lastcall_grace_left_seconds", "What is left of the stop's budget; 0 without a stop.", value=left
        )
        dropped = CounterMetricFamily(
            "lastcall_output_dropped_lines", "Lines dropped for a slow reader.", labels=["stream"]
        )
        for stream, count in self._status.outputs.dropped.items():
            dropped.add_metric([stream], count)
        yield dropped
        yield GaugeMetricFamily(
            "lastcall_resident_memory_bytes",
            "Resident memory of the supervisor.",
            value=rss_bytes(),
        )

    def _slots(self) -> Iterator[Metric]:
        fleet = self._status.fleet
        generations = list(fleet.generations)
        states = Counter(generation.state for generation in generations)
        slots = GaugeMetricFamily(
            "lastcall_slots", "Workers by state, those on their way out included.", labels=["state"]
        )
        for state in SlotState:
            slots.add_metric([state.value], states[state])
        yield slots
        restarts = CounterMetricFamily(
            "lastcall_restarts", "Restarts by how the one before ended.", labels=["slot", "reason"]
        )
        for slot in fleet.slots:
            for reason in RESTART_REASONS:  # each from the start, because `increase` needs a first sample
                restarts.add_metric([str(slot.number), reason], slot.restarts[reason])
        yield restarts
        lag = GaugeMetricFamily(
            "lastcall_worker_loop_lag_seconds", "How late the worker's event loop last was.", labels=LABELS
        )
        age = GaugeMetricFamily(
            "lastcall_worker_last_beat_seconds",
            "Since the worker's last sign of life.",
            labels=LABELS,
        )
        rss = GaugeMetricFamily(
            "lastcall_worker_resident_memory_bytes", "Resident memory of the worker itself.", labels=LABELS
        )
        for generation in generations:
            beat = generation.reports.beat
            if beat is not None and generation.is_alive:
                label = [str(generation.slot), str(generation.number)]
                lag.add_metric(label, beat.lag_ms / 1000)
                age.add_metric(label, max(0.0, now() - beat.at))
                rss.add_metric(label, beat.rss_bytes)
        yield from (lag, age, rss)
        yield from self._memory()
        accepting = sum(generation.accepts for generation in generations)
        yield GaugeMetricFamily("lastcall_workers_accepting", "Workers that accept jobs.", value=accepting)
        yield GaugeMetricFamily(
            "lastcall_workers_wanted", "Slots that are to be kept up.", value=self._status.operations.wanted
        )
        yield GaugeMetricFamily("lastcall_held", "1 while a hold lasts.", value=float(fleet.is_held))
        full = CounterMetricFamily(
            "lastcall_full_seconds",
            "Time in which no worker took jobs although one was up.",
            labels=["reason"],
        )
        fleet.note_full()
        for reason, seconds in fleet.full_time.seconds.items():
            full.add_metric([reason], seconds)
        yield full
        failures = CounterMetricFamily(
            "lastcall_process_failures", "Job processes that did not get ready.", labels=["slot"]
        )
        for slot in fleet.slots:
            failures.add_metric([str(slot.number)], fleet.shared.process_failures[slot.number])
        yield failures
        yield CounterMetricFamily(
            "lastcall_stalls", "Workers that were found stuck.", value=self._status.watch.stalls
        )

    def _memory(self) -> Iterator[Metric]:
        footprints = self._status.footprints
        pss = GaugeMetricFamily(
            "lastcall_worker_pss_bytes",
            "Memory of the worker and of all below it; what is shared counts in parts.",
            labels=LABELS,
        )
        private = GaugeMetricFamily(
            "lastcall_worker_private_memory_bytes",
            "Memory of the worker and of all below it that none of them shares.",
            labels=LABELS,
        )
        for generation in self._status.fleet.generations:
            footprint = footprints.of((generation.slot, generation.number))
            if footprint is not None and generation.is_alive:
                label = [str(generation.slot), str(generation.number)]
                pss.add_metric(label, footprint.pss)
                private.add_metric(label, footprint.private)
        yield from (pss, private)
        images = footprints.images()
        yield GaugeMetricFamily(
            "lastcall_image_pss_bytes",
            "Memory of the image; what is shared counts in parts. 0 without an image.",
            value=sum(each.pss for each in images),
        )
        yield GaugeMetricFamily(
            "lastcall_image_private_memory_bytes",
            "Memory of the image that no worker shares; 0 without an image.",
            value=sum(each.private for each in images),
        )

    def _jobs(self) -> Iterator[Metric]:
        fleet = self._status.fleet
        jobs = GaugeMetricFamily("lastcall_jobs_running", "Jobs accepted or running.", labels=["slot"])
        for slot in fleet.slots:
            jobs.add_metric([str(slot.number)], len(slot.jobs))
        yield jobs
        yield CounterMetricFamily("lastcall_jobs_started", "Jobs accepted.", value=fleet.ledger.started)
        for fate in FATES:
            help = f"Jobs that ended as {fate}."
            yield CounterMetricFamily(f"lastcall_jobs_{fate}", help, value=fleet.ledger.count(fate))
        handovers = CounterMetricFamily(
            "lastcall_handovers", "Tries to hand over a call by result.", labels=["result"]
        )
        for result in RESULTS:
            handovers.add_metric([result], fleet.ledger.handovers[result])
        yield handovers
        yield from self._cuts()
        for name, histogram, help in (
            ("lastcall_fence_seconds", fleet.shared.fence_seconds, "From fence to its acknowledgement."),
            (
                "lastcall_drain_seconds",
                fleet.shared.drain_seconds,
                "From fence to the end of a worker's last job.",
            ),
        ):
            yield HistogramMetricFamily(name, help, buckets=histogram.buckets, sum_value=histogram.sum)

    def _cuts(self) -> Iterator[Metric]:
        """Yield the jobs that a drain may cut, and the time before; a scrape sees both while it can.

        The supervisor knows no job of an opaque program. A 0 would say that none is left to wait for.
        """
        if self._status.fleet.launcher.is_opaque:
            return
        draining = [g for g in self._status.fleet.generations if g.jobs_to_cut]
        left = min((g.stopping.deadlines.drain_at - now() for g in draining), default=0.0)
        yield GaugeMetricFamily(
            "lastcall_jobs_to_cut",
            "Jobs of workers that are being stopped, which are cut when the drain is over.",
            value=sum(len(g.jobs_to_cut) for g in draining),
        )
        yield GaugeMetricFamily(
            "lastcall_drain_left_seconds",
            "Until the first of these jobs are asked to shut down; 0 without such jobs.",
            value=max(0.0, left),
        )

    def _pool(self) -> Iterator[Metric]:
        companion = self._status.companion
        if companion is None:
            return
        # A broker that starts has told nothing yet, and its counters begin at 0.
        figures = companion.figures
        for name, help in POOL_GAUGES.items():
            yield GaugeMetricFamily(f"lastcall_pool_{name}", help, value=figures.get(name, 0))
        for name, help in POOL_COUNTERS.items():
            yield CounterMetricFamily(f"lastcall_pool_{name}", help, value=figures.get(name, 0))

    def _operations(self) -> Iterator[Metric]:
        operations = CounterMetricFamily(
            "lastcall_operations",
            "Reloads, recycles, scalings and handovers by result.",
            labels=["verb", "result"],
        )
        counts = self._status.operations.counts
        for verb in VERBS:
            for result in ("done", "failed"):
                operations.add_metric([verb, result], counts[verb, result])
        yield operations


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
