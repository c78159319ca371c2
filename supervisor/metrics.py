"""`lastcall_*` metrics, collected from the live state at each scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from . import family
from .states import SlotState
from .status import View

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Collector:
    """Turns the state into metric families; nothing is counted twice because nothing is kept here."""

    def __init__(self, view: View) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        fleet = self._view.fleet
        states = Counter(slot.state for slot in fleet.slots)
        slots = GaugeMetricFamily("lastcall_slots", "Slots by state.", labels=["state"])
        for state in SlotState:
            slots.add_metric([state.value], states[state])
        yield slots
        jobs = GaugeMetricFamily("lastcall_jobs_running", "Jobs accepted or running.", labels=["slot"])
        restarts = CounterMetricFamily("lastcall_restarts", "Restarts after failures.", labels=["slot"])
        lag = GaugeMetricFamily(
            "lastcall_worker_loop_lag_seconds", "How late the worker's event loop last was.", labels=["slot"]
        )
        rss = GaugeMetricFamily(
            "lastcall_worker_resident_memory_bytes",
            "Resident memory of the worker's main process.",
            labels=["slot"],
        )
        for slot in fleet.slots:
            label = [str(slot.number)]
            jobs.add_metric(label, len(slot.jobs))
            restarts.add_metric(label, slot.restarts)
            if slot.beat is not None:
                lag.add_metric(label, slot.beat.lag_ms / 1000)
                rss.add_metric(label, slot.beat.rss_bytes)
        yield from (jobs, restarts, lag, rss)
        yield CounterMetricFamily("lastcall_jobs_started", "Jobs accepted.", value=fleet.ledger.started)
        for name in ("finished", "failed", "cut", "lost"):
            help = f"Jobs that ended as {name}."
            yield CounterMetricFamily(f"lastcall_jobs_{name}", help, value=fleet.ledger.totals[name])
        accepting = sum(slot.accepts for slot in fleet.slots)
        yield GaugeMetricFamily("lastcall_workers_accepting", "Workers that accept jobs.", value=accepting)
        yield GaugeMetricFamily(
            "lastcall_stopping", "1 while a stop is under way.", value=float(self._view.countdown is not None)
        )
        yield GaugeMetricFamily(
            "lastcall_resident_memory_bytes", "Resident memory of the supervisor.", value=family.rss_bytes()
        )


class Metrics:
    """The exposition of one supervisor, in a registry of its own."""

    def __init__(self, view: View) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Collector(view))

    def text(self) -> bytes:
        return generate_latest(self._registry)
