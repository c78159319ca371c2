"""The screen of the demo: each call a bar that grows to its end, the stop a ruler, and the next Ctrl-C."""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from lastcall.supervisor.cli.plain_text import plain_name, waits_for
from lastcall.supervisor.cli.tables import stop_ruler
from lastcall.worker.base.plurals import counted

# By how many Ctrl-C were meant in this stop.
NEXT_PRESS = (
    "Ctrl-C asks the calls that still run to end now",
    "Ctrl-C kills everything",
)
FIRST_PRESS = "Ctrl-C stops: no new call, and the calls that run end by themselves"
# Cells of the name of a room, and of a bar at most. Ours: a second of a call is some cells.
NAME = 14
BAR_AT_MOST = 60
# Cells beside the bar: the name, the slot, the seconds and the gaps.
BESIDE = NAME + 22
# Rows of the screen that are left to the log, the headline, the ruler and the last line.
OTHER_ROWS = 10
ROWS_AT_LEAST = 3
NEXT = (
    ("lastcall rehearse agent.py", "stop your agent in seven ways"),
    ("lastcall dev agent.py", "talk to your agent, and change its code"),
    ("lastcall run agent.py", "run it, in place of python agent.py start"),
)


class DemoView:
    """One moment of the demo for rich's console.

    Calls take `call_seconds`. `presses` counts the Ctrl-C in this stop, and is None without a stop.
    """

    def __init__(
        self, document: dict[str, Any], *, call_seconds: float, presses: int | None, height: int
    ) -> None:
        self._document = document
        self._call_seconds = call_seconds
        self._presses = presses
        self._rows = max(ROWS_AT_LEAST, height - OTHER_ROWS)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        document, width = self._document, options.max_width
        totals = document["totals"]
        yield Text("")
        yield Text.assemble(
            (document["phase"], "bold"),
            f"  calls: {totals['started']} begun, {totals['finished']} ended by themselves,"
            f" {totals['cut']} cut, {totals['lost']} lost",
        )
        if document["stop_s"] is not None:
            yield stop_ruler(document, width, plain=options.ascii_only)
        calls = [(slot, job) for slot in document["slots"] for job in slot["jobs"]]
        calls.sort(key=lambda each: -each[1]["age_s"])
        for slot, job in calls[: self._rows]:
            yield self._bar(slot, job, width, plain=options.ascii_only)
        if len(calls) > self._rows:
            yield Text(f"+ {counted(len(calls) - self._rows, 'more call')}", style="dim")
        if not calls:
            waits = waits_for(document)
            yield Text(f"waits for {waits}" if waits else "no call runs", style="dim")
        yield Text(next_press(self._presses), style="bold cyan")

    def _bar(self, slot: dict[str, Any], job: dict[str, Any], width: int, *, plain: bool) -> Text:
        cells = max(4, min(BAR_AT_MOST, width - BESIDE))
        done = min(cells, round(job["age_s"] / self._call_seconds * cells))
        passed, ahead = ("=", ".") if plain else ("━", "─")
        line = Text(f"{plain_name(job['room'])[:NAME]:{NAME}}  slot {slot['slot']:<3}")
        line.append(passed * done, "green")
        line.append(ahead * (cells - done), "dim")
        line.append(f"  {job['age_s']:4.1f} s")
        line.no_wrap = True
        return line


def next_press(presses: int | None) -> str:
    """Return what the next Ctrl-C does; `presses` are those that were meant, None before any stop."""
    if presses is None:
        return FIRST_PRESS
    return NEXT_PRESS[min(max(0, presses - 1), len(NEXT_PRESS) - 1)]


def what_next() -> list[str]:
    """Return the commands to try after the demo, one a line."""
    longest = max(len(command) for command, _ in NEXT)
    return ["Try next:", *(f"  {command:{longest}}  {text}" for command, text in NEXT)]
