"""The figures of the last stop for the textfile collector of Prometheus' node_exporter.

A scrape can't see the end of a stop, because the supervisor that would answer is gone. This file stays. The
names differ from those on /metrics, whose counters begin anew with each supervisor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest

from lastcall.supervisor.metric_family import Family

# Added to the path of the receipt. node_exporter reads the files of its directory that end so.
SUFFIX = ".prom"
FATES = ("finished", "failed", "cut", "ended_by_server", "handed_over", "lost")
OUTCOMES = ("clean", "cut", "forced", "gave_up", "fault")


def _family(name: str, text: str, *labels: str) -> Family:
    return Family(name=f"lastcall_last_stop_{name}", kind="gauge", text=text, labels=("receipt", *labels))


TIMESTAMP = _family("timestamp_seconds", "seconds since the epoch at the end of the last stop")
EXIT_CODE = _family("exit_code", "exit code of the last stop")
OUTCOME = _family("outcome", "1 for the outcome of the last stop, 0 for the others", "outcome")
GRACE = _family("grace_seconds", "seconds that the last stop was allowed to take")
SECONDS = _family("seconds", "seconds that the last stop took")
PHASES = _family("phase_seconds", "seconds of the last stop in each phase", "phase")
JOBS = _family("jobs", "jobs that were running when the last stop began", "fate")
ENDED = _family(
    "processes", "processes that were `killed` or `swept` in the last stop, or `left` after it", "what"
)


class _Figures:
    """A collector over one receipt. `at` is its end, in seconds of the epoch."""

    def __init__(self, document: dict[str, Any], path: str, at: float) -> None:
        self._document = document
        self._path = path
        self._at = at

    def collect(self) -> Iterator[Metric]:
        document, path = self._document, self._path
        yield TIMESTAMP.by([((path,), self._at)])
        yield EXIT_CODE.by([((path,), document["exit_code"])])
        yield GRACE.by([((path,), document["grace"])])
        yield SECONDS.by([((path,), document["seconds"])])
        fates = [job["fate"] for job in document["jobs"]]
        yield JOBS.by(((path, fate), fates.count(fate)) for fate in FATES)
        yield OUTCOME.by(((path, each), int(each == document["outcome"])) for each in OUTCOMES)
        processes = {
            "killed": len(document["killed"]), "swept": document["swept"], "left": document["left"],
        }  # fmt: skip
        yield ENDED.by(((path, what), count) for what, count in processes.items())
        yield PHASES.by(((path, phase), seconds) for phase, seconds in document["phases"].items())


def text_of(document: dict[str, Any], path: str, at: float) -> str:
    """Return the figures of the receipt in `path`, which tells the services of a host apart."""
    registry = CollectorRegistry()
    registry.register(_Figures(document, path, at))
    return generate_latest(registry).decode()
