"""The figures of the last stop for the textfile collector of Prometheus' node_exporter.

A scrape can't see the end of a stop, because the supervisor that would answer is gone. This file stays. The
names differ from those on /metrics, whose counters begin anew with each supervisor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest

# Added to the path of the receipt. node_exporter reads the files of its directory that end so.
SUFFIX = ".prom"
FATES = ("finished", "failed", "cut", "ended_by_server", "handed_over", "lost")
OUTCOMES = ("clean", "cut", "forced", "gave_up", "fault")
PROCESSES = ("killed", "swept", "left")


class _Figures:
    """A collector over one receipt. `at` is its end, in seconds of the epoch."""

    def __init__(self, document: dict[str, Any], path: str, at: float) -> None:
        self._document = document
        self._path = path
        self._at = at

    def collect(self) -> Iterator[GaugeMetricFamily]:
        document = self._document
        yield self._gauge("timestamp_seconds", "When the last stop was over.", self._at)
        yield self._gauge("exit_code", "The exit code of the last stop.", document["exit_code"])
        yield self._gauge("grace_seconds", "The grace of the last stop.", document["grace"])
        yield self._gauge("seconds", "How long the last stop took.", document["seconds"])
        fates = [job["fate"] for job in document["jobs"]]
        jobs = {fate: fates.count(fate) for fate in FATES}
        yield self._by("jobs", "Jobs of the last stop by fate.", "fate", jobs)
        outcome = {each: int(each == document["outcome"]) for each in OUTCOMES}
        yield self._by("outcome", "1 for the outcome of the last stop.", "outcome", outcome)
        processes = {
            "killed": len(document["killed"]), "swept": document["swept"], "left": document["left"],
        }  # fmt: skip
        yield self._by("processes", "Processes that the last stop had to end.", "what", processes)
        yield self._by("phase_seconds", "Seconds of the last stop by phase.", "phase", document["phases"])

    def _gauge(self, name: str, help: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"lastcall_last_stop_{name}", help, labels=["receipt"])
        family.add_metric([self._path], value)
        return family

    def _by(self, name: str, help: str, label: str, values: dict[str, Any]) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"lastcall_last_stop_{name}", help, labels=["receipt", label])
        for each, value in values.items():
            family.add_metric([self._path, each], value)
        return family


def text_of(document: dict[str, Any], path: str, at: float) -> str:
    """Return the figures of the receipt in `path`, which tells the services of a host apart."""
    registry = CollectorRegistry()
    registry.register(_Figures(document, path, at))
    return generate_latest(registry).decode()
