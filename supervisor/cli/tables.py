"""The status document as tables for people, as wide and as high as their terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from lastcall.supervisor.cli.plain_text import plain_name, state_of
from lastcall.worker.base.plurals import counted

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
# The columns of a slot, and whether their text stands at the right.
COLUMNS = {
    "slot": True, "gen": True, "state": False, "pid": True, "jobs": True, "lag ms": True, "pss MB": True,
    "restarts": True, "rooms (age s)": False,
}  # fmt: skip
# The columns that a narrow terminal loses, the first one first. The others say whether calls are served.
LOST_FIRST = ("lag ms", "gen", "pid", "pss MB", "restarts")
# Cells. Ours: the name of one room, and its age.
ROOMS_AT_LEAST = 16
GAP = 2
# Cells of the ruler at most. Ours: a longer one says no more.
RULER_AT_MOST = 60


class StatusView:
    """The status for rich's console: headline, slots, and in a stop the calls that still run.

    `height` are the rows that there are; without it every row is shown, as in a pipe.
    """

    def __init__(self, document: dict[str, Any], *, height: int | None = None) -> None:
        self._document = document
        self._height = height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        document, width = self._document, options.max_width
        head: list[RenderableType] = [_headline(document)]
        if document["grace_left_s"] is not None:
            head.append(stop_ruler(document, width, plain=options.ascii_only))
        tail: list[RenderableType] = list(map(_companion_line, document["companions"]))
        calls = _calls(document)
        slots = document["slots"]
        shown_slots, shown_calls = len(slots), len(calls)
        if self._height is not None:
            taken = len(console.render_lines(Group(*head, *tail), options, pad=False))
            shown_slots, shown_calls = _fitting(self._height - taken, len(slots), len(calls))
        yield from head
        if shown_slots:
            yield _slots(slots[:shown_slots], width)
        if hidden := slots[shown_slots:]:
            jobs = sum(len(slot["jobs"]) for slot in hidden)
            yield Text(f"{_more(shown_slots, len(hidden), 'slot')} with {counted(jobs, 'job')}", style="dim")
        if shown_calls:
            yield _call_table(calls[:shown_calls], width)
        if shown_calls < len(calls):
            yield Text(_more(shown_calls, len(calls) - shown_calls, "call"), style="dim")
        yield from tail


def status_table(document: dict[str, Any], *, height: int | None = None) -> StatusView:
    """Return what `lastcall status` prints."""
    return StatusView(document, height=height)


def stop_ruler(document: dict[str, Any], width: int, *, plain: bool = False) -> Text:
    """Return the time of a stop as a ruler: the part that has gone, and what is left to calls and in all."""
    gone, left = document["stop_s"], document["grace_left_s"]
    calls_left = document["drain_left_s"]
    whole = max(gone + left, 0.1)
    cells = max(10, min(RULER_AT_MOST, width - 40))
    here = min(cells - 1, round(gone / whole * cells))
    drain = min(cells - 1, round((gone + calls_left) / whole * cells))
    passed, ahead, edge = ("=", "-", "|") if plain else ("━", "─", "┊")
    line = Text("stop  ")
    line.append(passed * here, "yellow")
    line.append(ahead * (cells - here), "dim")
    if drain > here:
        line = Text.assemble(line[: 6 + drain], (edge, "bold"), line[7 + drain :])
    calls = f"{calls_left:.0f} s left to calls, " if calls_left > 0 else ""
    line.append(f"  {calls}{left:.0f} s in all")
    return line


def _fitting(rows: int, slots: int, calls: int) -> tuple[int, int]:
    """Return how many slots and calls are shown in so many rows, of which heads and counts take some.

    Calls matter more in a stop. Slots have half of the rows at most, and what calls leave. Where no row is
    left a table is only counted, that of the slots first.
    """

    def taken() -> int:
        tables = sum(1 + shown for shown in (shown_slots, shown_calls) if shown)
        return tables + (shown_slots < slots) + (shown_calls < calls)

    shown_slots, shown_calls = slots, calls
    while taken() > rows and shown_slots > max(0, rows // 2 - 2 if calls else 0):
        shown_slots -= 1
    while taken() > rows and shown_calls > 1:
        shown_calls -= 1
    while taken() > rows and shown_slots:
        shown_slots -= 1
    while taken() > rows and shown_calls:
        shown_calls -= 1
    return shown_slots, shown_calls


def _more(shown: int, hidden: int, what: str) -> str:
    """Return the count of the rows that are not shown."""
    return f"+ {counted(hidden, f'more {what}' if shown else what)}"


def _calls(document: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the calls that have an end, with their slots; those with the least time come first."""
    calls = [
        (slot, job)
        for slot in document["slots"]
        if slot.get("drain_left_s") is not None
        for job in slot["jobs"]
    ]
    return sorted(calls, key=lambda each: (each[0]["drain_left_s"], -each[1]["age_s"]))


def _call_table(calls: list[tuple[dict[str, Any], dict[str, Any]]], width: int) -> Table:
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="dim")
    table.add_column("call in room", no_wrap=True, max_width=max(8, width - 36), overflow="ellipsis")
    for name in ("slot", "age s", "may stay s"):
        table.add_column(name, justify="right", no_wrap=True)
    for slot, job in calls:
        left = slot["drain_left_s"]
        stay = Text(f"{left:.0f}") if left > 0 else Text("asked to end", style="yellow")
        table.add_row(Text(plain_name(job["room"])), str(slot["slot"]), f"{job['age_s']:.0f}", stay)
    return table


def _slots(slots: list[dict[str, Any]], width: int) -> Table:
    rows = [_cells(slot) for slot in slots]
    widths = {name: max([len(name), *(len(row[name]) for row in rows)]) for name in COLUMNS}
    widths["rooms (age s)"] = ROOMS_AT_LEAST
    shown = list(COLUMNS)
    for name in LOST_FIRST:
        if sum(widths[each] + GAP for each in shown) - GAP <= width:
            break
        shown.remove(name)
    table = Table(box=None, padding=(0, GAP, 0, 0), header_style="dim")
    for name in shown:
        is_last = name == shown[-1]
        table.add_column(
            name,
            justify="right" if COLUMNS[name] else "left",
            no_wrap=not is_last,  # rich makes a column narrower only if its text may wrap
            min_width=None if is_last else widths[name],
        )
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    return table


def _cells(slot: dict[str, Any]) -> dict[str, Text]:
    jobs = slot["jobs"]
    rooms = ", ".join(f"{plain_name(job['room'])} ({job['age_s']:.0f})" for job in jobs[:JOBS_SHOWN])
    more = f" +{len(jobs) - JOBS_SHOWN}" if len(jobs) > JOBS_SHOWN else ""
    pss = slot.get("pss_bytes")
    return {
        "slot": Text(str(slot["slot"])),
        "gen": Text(str(slot["generation"])),
        "state": Text(state_of(slot), style=STATE_COLOURS.get(state_of(slot), "")),
        "pid": Text(str(slot["pid"] or "-")),
        "jobs": Text(str(len(jobs))),
        "lag ms": Text("-" if slot["lag_ms"] is None else f"{slot['lag_ms']:.1f}"),
        "pss MB": Text("-" if not pss else f"{pss / 1e6:.0f}"),
        "restarts": Text(str(slot["restarts"])),
        "rooms (age s)": Text(
            rooms + more if jobs else slot["last_exit"] or "",
            style="" if jobs else "dim",
            no_wrap=True,
            overflow="ellipsis",
        ),
    }


def _companion_line(companion: dict[str, Any]) -> Text:
    state = companion["state"]
    line = Text.assemble(f"{companion['name']}  ", (state, STATE_COLOURS.get(state, "")))
    if "connections" in companion:
        line.append(
            f"  {counted(companion['connections'], 'connection')},"
            f" {counted(companion['contexts'], 'context')}, {companion['waiters']} waiting,"
            f" {counted(companion['clients'], 'job')} connected"
        )
    return line


def _headline(document: dict[str, Any]) -> Text:
    totals = document["totals"]
    line = Text.assemble(
        ("lastcall ", "bold"), f"pid {document['pid']}  ", (document["phase"], "bold"),
        f"  {counted(totals['started'], 'job')}, {totals['finished']} finished, {totals['failed']} failed,",
        f" {totals['cut']} cut, {totals['lost']} lost",
    )  # fmt: skip
    if memory := document.get("memory"):
        image = memory["image_pss_bytes"]
        shared = f", {image / 1e6:.0f} of them the image" if image else ""
        line.append(f"\n{memory['pss_bytes'] / 1e6:.0f} MB of memory{shared}", "dim")
    if document["held"]:
        line.append("  on hold", "yellow")
    elif full := document["full"]:
        why = f"{', '.join(full['reasons'])}: {full['text']}"
        line.append(f"\nno worker has taken a job for {full['since_s']:.0f} s ({why})", "yellow")
    for slot in document["slots"]:
        if slot["process_failures"]:
            failed = (
                f"slot {slot['slot']}: {counted(slot['process_failures'], 'job process')} did not get ready"
            )
            line.append(f"\n{failed}, the last: {slot['process_failure']}", "yellow")
    if document["reason"]:
        line.append(f"\nstopping ({document['reason']}), {document['grace_left_s']:.0f} s left", "yellow")
    return line
