"""The status document as a table for people."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lastcall.supervisor.cli.plain_text import totals_text

STATE_COLOURS = {
    "ready": "green",
    "starting": "cyan",
    "stalled": "bold red",
    "draining": "yellow",
    "closing": "yellow",
    "terminating": "red",
    "killing": "red",
    "failed": "red",
    "backoff": "red",
    "quarantined": "bold red",
    "stopped": "dim",
}
# Ours: as many room names as fit beside the other columns.
JOBS_SHOWN = 6


def status_table(document: dict[str, Any]) -> Group:
    """Return what `lastcall status` prints."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, justify in (
        ("slot", "right"), ("gen", "right"), ("state", "left"), ("pid", "right"), ("jobs", "right"),
        ("lag ms", "right"), ("rss MB", "right"), ("restarts", "right"), ("rooms (age s)", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # a literal, read from a tuple
    for slot in document["slots"]:
        jobs = slot["jobs"]
        rooms = ", ".join(f"{job['room']} ({job['age_s']:.0f})" for job in jobs[:JOBS_SHOWN])
        more = f" +{len(jobs) - JOBS_SHOWN}" if len(jobs) > JOBS_SHOWN else ""
        rss = slot["rss_bytes"]
        table.add_row(
            str(slot["slot"]),
            str(slot["generation"]),
            Text(slot["state"], style=STATE_COLOURS.get(slot["state"], "")),
            str(slot["pid"] or "-"),
            str(len(jobs)),
            "-" if slot["lag_ms"] is None else f"{slot['lag_ms']:.1f}",
            "-" if not rss else f"{rss / 1e6:.0f}",
            str(slot["restarts"]),
            rooms + more or Text(slot["last_exit"] or "", style="dim"),
        )
    return Group(_headline(document), table, *map(_companion_line, document["companions"]))


def _companion_line(companion: dict[str, Any]) -> Text:
    state = companion["state"]
    line = Text.assemble(f"{companion['name']}  ", (state, STATE_COLOURS.get(state, "")))
    if "connections" in companion:
        line.append(
            f"  {companion['connections']} connections, {companion['contexts']} contexts,"
            f" {companion['waiters']} waiting, {companion['clients']} jobs connected"
        )
    return line


def _headline(document: dict[str, Any]) -> Text:
    totals = document["totals"]
    line = Text.assemble(
        ("lastcall ", "bold"), f"pid {document['pid']}  ", (document["phase"], "bold"),
        f"  jobs: {totals['started']} started, {totals['finished']} finished, {totals['failed']} failed,",
        f" {totals['cut']} cut, {totals['lost']} lost",
    )  # fmt: skip
    if document["held"]:
        line.append("  on hold", "yellow")
    elif full := document["full"]:
        why = f"{', '.join(full['reasons'])}: {full['text']}"
        line.append(f"\nno worker has taken a job for {full['since_s']:.0f} s ({why})", "yellow")
    for slot in document["slots"]:
        if slot["process_failures"]:
            failed = f"slot {slot['slot']}: {slot['process_failures']} job processes did not get ready"
            line.append(f"\n{failed}, the last: {slot['process_failure']}", "yellow")
    if document["reason"]:
        line.append(f"\nstopping ({document['reason']}), {document['grace_left_s']:.0f} s left", "yellow")
    return line


def receipt_table(receipt: dict[str, Any]) -> Group:
    """Return a receipt for people: the verdict, the phases, and each job that was running."""
    good = receipt["outcome"] == "clean"
    verdict = Text.assemble(
        ("receipt ", "bold"),
        (receipt["outcome"], "bold green" if good else "bold red"),
        f"  exit code {receipt['exit_code']}  {receipt['seconds']:.1f} s  reason: {receipt['reason']}",
    )
    phases = "  ".join(f"{name} {seconds:.2f} s" for name, seconds in receipt["phases"].items())
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("job running at the stop", "room", "slot", "seconds", "fate"):
        table.add_column(name)
    for job in receipt["jobs"]:
        fate = Text(job["fate"] or "?", style="green" if job["fate"] == "finished" else "red")
        table.add_row(job["id"], job["room"], str(job["slot"]), f"{job['seconds']:.1f}", fate)
    pool = [_pool_line(each) for each in receipt["resources"] if each["name"] == "inworld-pool"]
    tail = Text(
        f"all jobs: {totals_text(receipt)}; swept {receipt['swept']}, processes left {receipt['left']}",
        style="dim",
    )
    return Group(verdict, Text(phases, style="dim"), table, *pool, tail)


def _pool_line(resource: dict[str, Any]) -> Text:
    counts = ", ".join(
        f"{n} {what} {fate}" for what, fates in resource["counts"].items() for fate, n in fates.items()
    )
    good = resource["fate"] == "closed"
    return Text.assemble(
        "inworld-pool  ", (resource["fate"], "green" if good else "red"), f"  {counts}" if counts else ""
    )
