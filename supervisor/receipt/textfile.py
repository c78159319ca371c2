"""The figures of the last stop for the textfile collector of Prometheus' node_exporter.

A scrape can't see the end of a stop, because the supervisor that would answer is gone. This file stays. The
names differ from those on /metrics, whose counters begin anew with each supervisor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Added to the path of the receipt. node_exporter reads the files of its directory that end so.
SUFFIX = ".prom"
FATES = ("finished", "failed", "cut", "ended_by_server", "handed_over", "lost")
OUTCOMES = ("clean", "cut", "forced", "gave_up", "fault")
PROCESSES = ("killed", "swept", "left")


# Of a label: https://prometheus.io/docs/instrumenting/exposition_formats/#comments-help-text-and-type-information
ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", '"': '\\"'})


def text_of(document: dict[str, Any], path: str, at: float) -> str:
    """Return the figures of the receipt in `path`, which tells the services of a host apart.

    `at` is the end of the stop, in seconds of the epoch. prometheus_client would write the same text, and its
    import takes longer than the end of a stop without jobs.
    """
    return "".join(_lines(document, path, at))


def _lines(document: dict[str, Any], path: str, at: float) -> Iterator[str]:
    def gauge(name: str, help: str, value: float) -> str:
        return family(name, help, [("", value)])

    def by(name: str, help: str, label: str, values: dict[str, Any]) -> str:
        return family(name, help, [(f',{label}="{each}"', value) for each, value in values.items()])

    def family(name: str, help: str, samples: list[tuple[str, float]]) -> str:
        whole = f"lastcall_last_stop_{name}"
        lines = [f'{whole}{{receipt="{receipt}"{label}}} {float(value)}\n' for label, value in samples]
        return "".join([f"# HELP {whole} {help}\n# TYPE {whole} gauge\n", *lines])

    receipt = path.translate(ESCAPES)
    yield gauge("timestamp_seconds", "When the last stop was over.", at)
    yield gauge("exit_code", "The exit code of the last stop.", document["exit_code"])
    yield gauge("grace_seconds", "The grace of the last stop.", document["grace"])
    yield gauge("seconds", "How long the last stop took.", document["seconds"])
    fates = [job["fate"] for job in document["jobs"]]
    jobs = {fate: fates.count(fate) for fate in FATES}
    yield by("jobs", "Jobs of the last stop by fate.", "fate", jobs)
    outcome = {each: int(each == document["outcome"]) for each in OUTCOMES}
    yield by("outcome", "1 for the outcome of the last stop.", "outcome", outcome)
    processes = {
        "killed": len(document["killed"]), "swept": document["swept"], "left": document["left"],
    }  # fmt: skip
    yield by("processes", "Processes that the last stop had to end.", "what", processes)
    yield by("phase_seconds", "Seconds of the last stop by phase.", "phase", document["phases"])
