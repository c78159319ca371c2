"""Draws the layout of a stop with characters, as wide as the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lastcall.supervisor.picture.timeline import Bar, Timeline, duration, ticks

PHASE_STYLES = {
    "fencing": "cyan",
    "draining": "green",
    "closing": "yellow",
    "terminating": "red",
    "killing": "bold red",
    "sweeping": "magenta",
}
GOOD_STYLE, BAD_STYLE = "green", "bold red"
# Columns. Ours: room names of people and programs, and a bar in which a tenth of a stop can be seen.
ROOM_AT_MOST = 24
ROOM_AT_LEAST = 8
BAR_AT_LEAST = 12
TICK_EVERY = 14
# Columns from which the seconds of the phases stand below them, and not at the left edge.
INDENTED_FROM = 100


class Glyphs:
    """The characters of a picture; plain ones where a terminal has no others."""

    def __init__(self, *, plain: bool) -> None:
        self.bar, self.half, self.before = ("=", "=", "<") if plain else ("━", "╸", "◂")
        self.asked, self.deadline, self.mark = ("x", ":", "v") if plain else ("╋", "┊", "▼")
        self.edge, self.phase = ("|", "-") if plain else ("│", "─")


class StopPicture:
    """A stop for rich's console: headline, scale, phases, marks, jobs, and what has no place in time."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _lines(self._timeline, options.max_width, Glyphs(plain=options.ascii_only))


def _lines(timeline: Timeline, width: int, glyphs: Glyphs) -> Iterable[RenderableType]:
    rows = [_Row(bar) for bar in timeline.bars]
    right = max([0, *(cell_len(row.right) for row in rows)])
    rooms = max([len("phases"), *(cell_len(row.room) for row in rows)])
    room = max(ROOM_AT_LEAST, min(rooms, ROOM_AT_MOST, width // 4))
    scale = width - room - 2 - (right + 2 if right else 0)
    if scale < BAR_AT_LEAST:  # a narrow terminal: the fate goes without its seconds
        rows = [_Row(bar, is_short=True) for bar in timeline.bars]
        right = max([0, *(cell_len(row.right) for row in rows)])
        scale = max(BAR_AT_LEAST, width - room - 2 - (right + 2))
    # The edges of the scale are inside of it, so the last label can stand below its time.
    draw = _Scale(timeline, scale, glyphs)

    good = timeline.receipt.outcome == "clean"
    yield Text.assemble(
        (timeline.receipt.outcome, GOOD_STYLE if good else BAD_STYLE), "  ", timeline.headline
    )
    yield Text("")
    yield _row("", draw.ticks(), "", room, scale)
    yield _row("phases", draw.phases(), "", room, scale)
    yield Padding(draw.legend(), (0, 0, 0, room + 2 if width >= INDENTED_FROM else 0))
    if timeline.marks:
        yield _row("", draw.marks(), "", room, scale)
    for row in rows:
        style = GOOD_STYLE if row.bar.is_good else BAD_STYLE
        yield _row(row.room, draw.bar(row.bar), Text(row.right, style=style), room, scale)
    if not rows:
        yield Text("no job was running", style="dim")
    if any(row.bar.end is None for row in rows):
        yield Text("a job without a bar: the receipt does not say when it ended", style="dim")
    yield Text("")
    events = Table.grid(padding=(0, 2, 0, 0))
    events.add_column(justify="right", style="bold", no_wrap=True)
    events.add_column()
    for mark in timeline.marks:
        events.add_row(duration(mark.at), Text(mark.text))
    yield events
    for fact in timeline.facts:
        yield Text(fact, style="dim")


class _Row:
    """The words beside one bar."""

    def __init__(self, bar: Bar, *, is_short: bool = False) -> None:
        self.bar = bar
        self.room = bar.job.room or bar.job.id
        self.right = bar.short_fate if is_short else f"{duration(bar.job.seconds):>8}  {bar.fate}"


class _Scale:
    """Turns times into columns."""

    def __init__(self, timeline: Timeline, width: int, glyphs: Glyphs) -> None:
        self._timeline, self._width, self._glyphs = timeline, width, glyphs

    def column(self, at: float) -> int:
        """Return the column of a time, inside the scale."""
        column = round(at / self._timeline.length * (self._width - 1))
        return max(0, min(self._width - 1, column))

    def ticks(self) -> Text:
        """Return the times above the scale, as many as do not touch each other."""
        line = ""
        for at in ticks(self._timeline.length, max(2, self._width // TICK_EVERY)):
            label = "0" if at == 0 else duration(at)
            column = self.column(at)
            if column >= len(line) + (1 if line else 0) and column + len(label) <= self._width:
                line = line.ljust(column) + label
        return Text(line, style="dim")

    def phases(self) -> Text:
        """Return the phases side by side, each with its name where that fits."""
        line = Text(" " * self._width)
        for span in self._timeline.phases:
            start, end = self.column(span.start), self.column(span.end)
            width = end - start + 1
            text = self._glyphs.edge + (f"{span.name:{self._glyphs.phase}^{width - 1}}"[: width - 1])
            if width - 1 < len(span.name):
                text = self._glyphs.edge + self._glyphs.phase * (width - 1)
            line = _overlaid(line, start, text, PHASE_STYLES.get(span.name, ""))
        return line

    def legend(self) -> Text:
        """Return the seconds of each phase."""
        parts = [
            (f"{span.name} {duration(span.end - span.start)}", PHASE_STYLES.get(span.name, ""))
            for span in self._timeline.phases
        ]
        line = Text()
        for number, (text, style) in enumerate(parts):
            line.append("   " if number else "")
            line.append(text.replace(" ", "\u00a0"), style)
        return line if parts else Text("no phase was entered", style="dim")

    def marks(self) -> Text:
        line = Text(" " * self._width)
        for mark in self._timeline.marks:
            glyph = self._glyphs.deadline if mark.is_deadline else self._glyphs.mark
            line = _overlaid(line, self.column(mark.at), glyph, "bold")
        return line

    def bar(self, bar: Bar) -> Text:
        """Return the bar of one job, with the deadline behind it."""
        line = Text(" " * self._width)
        for mark in self._timeline.marks:
            if mark.is_deadline:
                line = _overlaid(line, self.column(mark.at), self._glyphs.deadline, "dim")
        if bar.end is None:
            return line
        start, end = self.column(max(0.0, bar.start)), self.column(bar.end)
        text = self._glyphs.bar * (end - start) + self._glyphs.half
        line = _overlaid(line, start, text, GOOD_STYLE if bar.is_good else BAD_STYLE)
        if bar.start < 0 and end > start:
            line = _overlaid(line, 0, self._glyphs.before, "dim")
        if bar.asked is not None:
            line = _overlaid(line, self.column(bar.asked), self._glyphs.asked, BAD_STYLE)
        return line


def _overlaid(line: Text, column: int, text: str, style: str) -> Text:
    """Return a line of single cells with a text in place of what is there."""
    return Text.assemble(line[:column], (text, style), line[column + len(text) :])


def _row(label: str, middle: Text, right: str | Text, width: int, scale: int) -> Text:
    shown = label if cell_len(label) <= width else set_cell_size(label, width - 1) + "…"
    middle.pad_right(max(0, scale - middle.cell_len))
    line = Text.assemble(f"{set_cell_size(shown, width)}  ", middle, "  " if right else "", right)
    line.rstrip()
    line.no_wrap = True
    return line
