"""The figures of the last stop for the textfile collector of Prometheus' node_exporter.

A scrape can't see the end of a stop, because the supervisor that would answer is gone. This file stays. The
names differ from those on /metrics, whose counters begin anew with each supervisor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


# Of a label: https://prometheus.io/docs/instrumenting/exposition_formats/#comments-help-text-and-type-information
ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", '"': '\\"'})

# The values of the labels, and the value.
Samples = list[tuple[tuple[str, ...], float]]


def text_of(document: dict[str, Any], path: str, at: float) -> str:
    """Return the figures of the receipt in `path`, which tells the services of a host apart.

    `at` is the end of the stop, in seconds of the epoch. prometheus_client would write the same text, and its
    import takes longer than the end of a stop without jobs.
    """
    return "".join(
        line for family, samples in _figures(document, path, at) for line in _lines(family, samples)
    )


def _figures(document: dict[str, Any], path: str, at: float) -> Iterator[tuple[Family, Samples]]:
    yield TIMESTAMP, [((path,), at)]
    yield EXIT_CODE, [((path,), document["exit_code"])]
    yield GRACE, [((path,), document["grace"])]
    yield SECONDS, [((path,), document["seconds"])]
    fates = [job["fate"] for job in document["jobs"]]
    yield JOBS, [((path, fate), fates.count(fate)) for fate in FATES]
    yield OUTCOME, [((path, each), int(each == document["outcome"])) for each in OUTCOMES]
    processes = {
        "killed": len(document["killed"]), "swept": document["swept"], "left": document["left"],
    }  # fmt: skip
    yield ENDED, [((path, what), count) for what, count in processes.items()]
    yield PHASES, [((path, phase), seconds) for phase, seconds in document["phases"].items()]


def _lines(family: Family, samples: Samples) -> Iterator[str]:
    yield f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.kind}\n"
    for values, value in samples:
        pairs = zip(family.labels, values, strict=True)
        labels = ",".join(f'{name}="{text.translate(ESCAPES)}"' for name, text in pairs)
        yield f"{family.name}{{{labels}}} {float(value)}\n"
