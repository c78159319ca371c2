"""Lays a stop out on one scale of time. Pure; a terminal and a page draw the same layout.

0 s                                                  end_at of the scale
|-- fencing --|------ draining ------|-- closing --|     phases
▼ SIGTERM            ▼ hurry                             what was asked when
============ r0, finished                                one bar for each job, to its end
                                          ¦              by when jobs had to have ended
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lastcall.supervisor.picture.reading import SeenJob, SeenReceipt
from lastcall.worker.base.plurals import counted

# A deadline far behind the end would leave no room for the stop. Ours: a stop of 5 s with an hour of grace is
# drawn over 5 s, one that has used half of its time is drawn over all of it.
DEADLINE_SHOWN_WITHIN = 2.0
# Ours: a stop without a job ends in milliseconds, and the scale has to have a length.
SHORTEST_SCALE = 0.1
# Fates that are no fault of a stop.
GOOD = frozenset({"finished", "ended_by_server", "handed_over"})
AT_DEADLINE = "deadline: jobs that are left are asked to shut down"
ASKED = {
    "stop": "no new job from here on",
    "hurry": "the drain ends: jobs that are left are asked to shut down",
    "kill": "everything is killed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One phase, in seconds after the beginning of the stop."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One job. `end` is None where the receipt does not say it; `asked` is when it was asked to shut down.

    `start` is negative for a job that ran when the stop began.
    """

    job: SeenJob
    start: float
    end: float | None
    asked: float | None

    @property
    def fate(self) -> str:
        """The fate in words. A job without one ran when its supervisor wrote the receipt."""
        return f"{self.short_fate}, process {self.job.process}" if self.job.process else self.short_fate

    @property
    def short_fate(self) -> str:
        """The fate without that of the process."""
        return (self.job.fate or "unknown").replace("_", " ")

    @property
    def is_good(self) -> bool:
        return self.job.fate in GOOD


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Something that happened, or was to happen, at one time."""

    at: float
    text: str
    is_deadline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The layout. `length` is the scale's, in seconds; `facts` are lines that have no place on it."""

    receipt: SeenReceipt
    length: float
    phases: tuple[Span, ...]
    bars: tuple[Bar, ...]
    marks: tuple[Mark, ...]
    facts: tuple[str, ...]

    @property
    def headline(self) -> str:
        """The stop in one line."""
        receipt = self.receipt
        return (
            f"exit code {receipt.exit_code}, {duration(receipt.seconds)} of {duration(receipt.grace)} grace,"
            f" {receipt.reason}"
        )


def lay_out(receipt: SeenReceipt) -> Timeline:
    """Return the layout of a stop."""
    drain_by = receipt.deadlines.get("drain")
    ends = [job.ended_after for job in receipt.jobs if job.ended_after is not None]
    length = max([receipt.seconds, SHORTEST_SCALE, *ends])
    marks = [
        Mark(at=ask.after, text=_asked(ask.what, receipt.reason)) for ask in receipt.asked if ask.after >= 0
    ]
    if drain_by is not None and drain_by <= length * DEADLINE_SHOWN_WITHIN:
        length = max(length, drain_by)
        marks.append(Mark(at=drain_by, text=AT_DEADLINE, is_deadline=True))
    asked = [job.asked_after for job in receipt.jobs if job.asked_after is not None]
    if asked:
        marks.append(Mark(at=min(asked), text=f"{counted(len(asked), 'job')} asked to shut down"))
    return Timeline(
        receipt=receipt,
        length=length,
        phases=_phases(receipt),
        bars=tuple(sorted(map(_bar, receipt.jobs), key=_by_importance)),
        marks=tuple(sorted(marks, key=lambda mark: mark.at)),
        facts=tuple(_facts(receipt, length)),
    )


def ticks(length: float, count: int) -> list[float]:
    """Return round times from 0 to `length`, about `count` of them."""
    rough = length / max(1, count)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough * 0.999)
    return [n * step for n in range(int(length / step * 1.0001) + 1)]


def duration(seconds: float) -> str:
    """Return seconds as people say them: 0.012 s, 3.4 s, 12 min 5 s, 1 h."""
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 0.1:
        return f"{seconds:.3f} s" if seconds else "0 s"
    if seconds < 120:
        tenths = round(seconds, 1)
        return f"{tenths:.1f} s" if tenths % 1 else f"{tenths:.0f} s"
    whole = round(seconds)
    parts = ((whole // 3600, "h"), (whole % 3600 // 60, "min"), (whole % 60, "s"))
    return " ".join(f"{n} {unit}" for n, unit in parts if n)


def _asked(what: str, reason: str) -> str:
    text = ASKED.get(what, what)
    return f"{reason}: {text}" if what == "stop" else text


def _phases(receipt: SeenReceipt) -> tuple[Span, ...]:
    """Return the phases, the last of which ends with the stop."""
    spans = []
    start = max(0.0, receipt.seconds - sum(receipt.phases.values()))
    for name, seconds in receipt.phases.items():
        spans.append(Span(name=name, start=start, end=start + seconds))
        start += seconds
    return tuple(spans)


def _bar(job: SeenJob) -> Bar:
    start = 0.0 if job.ended_after is None else job.ended_after - job.seconds
    return Bar(job=job, start=start, end=job.ended_after, asked=job.asked_after)


def _by_importance(bar: Bar) -> tuple[bool, float]:
    """Jobs that the stop has harmed come first, then those that ended last."""
    return bar.is_good, -(bar.end or 0.0)


def _facts(receipt: SeenReceipt, length: float) -> list[str]:
    drain_by = receipt.deadlines.get("drain")
    lines = []
    if drain_by is not None and drain_by > length:
        lines.append(f"jobs had until {duration(drain_by)} to end, beyond the right edge")
    if receipt.fault:
        lines.append(f"fault: {receipt.fault}")
    if receipt.fence_unacknowledged:
        slots = ", ".join(map(str, receipt.fence_unacknowledged))
        lines.append(f"no answer to the fence from slot {slots}: its event loop was blocked")
    for resource in receipt.resources:
        counts = ", ".join(
            f"{what.replace('_', ' ')} {fate} {n}"
            for what, fates in resource.counts.items()
            for fate, n in fates.items()
        )
        if resource.fate != "closed" or counts:
            slot = "" if resource.slot is None else f" of slot {resource.slot}"
            lines.append(f"{resource.name}{slot}: {resource.fate}{f' ({counts})' if counts else ''}")
    totals = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in receipt.totals.items() if n)
    lines.append(f"all jobs since the start: {totals or 'none'}")
    lines.append(f"processes: {len(receipt.killed)} killed, {receipt.swept} swept, {receipt.left} left")
    return lines
