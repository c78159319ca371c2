"""Draws the layout of stops as one HTML page that needs nothing else: no network, no script, no font.

Each stop is an SVG and, below it, a table with the same. Everything from a receipt is escaped, and the page's
policy forbids scripts and requests, so that a room's name can do nothing in a browser either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lastcall.supervisor.picture.timeline import Bar, Timeline, duration, ticks

# Units of the SVG. Ours: the browser scales them to the window.
WIDTH, LEFT, RIGHT = 1000, 170, 190
SCALE = WIDTH - LEFT - RIGHT
ROW, BAR, TOP = 22, 12, 22
# Times above the scale. Ours: as many as do not touch each other.
TICKS = 8
# Units that a letter of a phase's name takes, and characters that fit beside the bars.
LETTER = 7.0
ROOM_CHARACTERS, FATE_CHARACTERS = 21, 26

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #667; --back: #fff; --line: #d5d8de;
  --good: #1a7f4b; --bad: #c8102e; --fencing: #0e7490; --draining: #1a7f4b; --closing: #a16207;
  --terminating: #c2410c; --killing: #c8102e; --sweeping: #7e22ce; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --dim: #9aa0aa; --back: #16181c;
  --line: #363a42; --good: #4ade80; --bad: #ff6b7d; --fencing: #22d3ee; --draining: #4ade80;
  --closing: #facc15; --terminating: #fb923c; --killing: #ff6b7d; --sweeping: #c084fc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 75rem; color: var(--ink); background: var(--back);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 1rem; color: var(--dim); overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; min-width: 40rem; height: auto; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
svg .dim { fill: var(--dim); } svg .grid { stroke: var(--line); }
svg .deadline { stroke: var(--bad); stroke-dasharray: 4 4; }
svg .asked { stroke: var(--bad); stroke-width: 2; } svg .mark { fill: var(--ink); }
svg .bar-good { fill: var(--good); } svg .bar-bad { fill: var(--bad); }
svg .on-phase { fill: var(--back); }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; vertical-align: top; }
.jobs { min-width: 46rem; } .jobs td:first-child { min-width: 10rem; }
.jobs td:nth-child(2) { min-width: 9rem; }
.short td:first-child { white-space: nowrap; }
th { color: var(--dim); font-weight: 500; white-space: nowrap; }
ul { padding-left: 1.2rem; color: var(--dim); overflow-wrap: anywhere; }
"""
PHASES = frozenset({"fencing", "draining", "closing", "terminating", "killing", "sweeping"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One stop of a page, or a scene without one. `notes` stand above the picture."""

    title: str
    is_good: bool
    text: str = ""
    notes: tuple[str, ...] = ()
    timeline: Timeline | None = None


def page(title: str, sections: Sequence[Section]) -> str:
    """Return a whole page with a section for each stop."""
    body = "".join(map(_section, sections))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy"'
        " content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}</body>\n</html>\n"
    )


def section_of(timeline: Timeline) -> Section:
    """Return the section of one receipt."""
    receipt = timeline.receipt
    return Section(
        title=receipt.outcome.replace("_", " "),
        is_good=receipt.outcome == "clean",
        text=timeline.headline + (f", ended {receipt.at}" if receipt.at else ""),
        timeline=timeline,
    )


def _section(section: Section) -> str:
    colour = "good" if section.is_good else "bad"
    parts = [f'<section>\n<h2 class="{colour}">{escape(section.title)}</h2>\n']
    if section.text:
        parts.append(f"<p>{escape(section.text)}</p>\n")
    if section.notes:
        parts.append(_list(section.notes))
    if section.timeline is not None:
        parts += [_drawing(section.timeline), _tables(section.timeline), _list(section.timeline.facts)]
    return "".join([*parts, "</section>\n"])


def _drawing(timeline: Timeline) -> str:
    top = TOP + ROW + (ROW if timeline.marks else 0)
    height = top + max(1, len(timeline.bars)) * ROW + 6
    parts = [
        f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-label="{escape(timeline.receipt.outcome)}: {escape(timeline.headline)}">\n'
    ]
    for at in ticks(timeline.length, TICKS):
        x = _x(timeline, at)
        anchor = "start" if at == 0 else "middle"
        parts.append(
            f'<line class="grid" x1="{x}" x2="{x}" y1="18" y2="{height}"/>'
            f'<text class="dim" x="{x}" y="13" text-anchor="{anchor}">{duration(at)}</text>\n'
        )
    parts.append(f'<text class="dim" x="0" y="{TOP + 15}">phases</text>\n')
    parts += _phases(timeline)
    parts += _marks(timeline, TOP + ROW, height)
    for number, bar in enumerate(timeline.bars):
        parts.append(_bar(timeline, bar, top + number * ROW))
    if not timeline.bars:
        parts.append(f'<text class="dim" x="{LEFT}" y="{top + 15}">no job was running</text>\n')
    return "".join([*parts, "</svg></div>\n"])


def _phases(timeline: Timeline) -> list[str]:
    parts = []
    for span in timeline.phases:
        x = _x(timeline, span.start)
        width = max(1.0, round(_x(timeline, span.end) - x, 1))
        colour = f"var(--{span.name})" if span.name in PHASES else "var(--dim)"
        name = f"{escape(span.name)} {duration(span.end - span.start)}"
        parts.append(
            f'<rect class="phase" x="{x}" y="{TOP}" width="{width}" height="{ROW - 4}" fill="{colour}">'
            f"<title>{name}</title></rect>\n"
        )
        if width > LETTER * len(span.name) + 8:
            parts.append(
                f'<text class="on-phase" x="{x + width / 2:.1f}" y="{TOP + 14}" text-anchor="middle">'
                f"{escape(span.name)}</text>\n"
            )
    return parts


def _marks(timeline: Timeline, top: float, height: float) -> list[str]:
    parts = []
    for mark in timeline.marks:
        x = _x(timeline, mark.at)
        title = f"<title>{duration(mark.at)}: {escape(mark.text)}</title>"
        if mark.is_deadline:
            parts.append(
                f'<line class="deadline" x1="{x}" x2="{x}" y1="{top}" y2="{height}">{title}</line>\n'
            )
        parts.append(f'<path class="mark" d="M{x - 5:.1f} {top + 3} h10 l-5 9 z">{title}</path>\n')
    return parts


def _bar(timeline: Timeline, bar: Bar, top: float) -> str:
    good = "good" if bar.is_good else "bad"
    room = bar.job.room or bar.job.id
    middle = top + 15
    title = f"<title>{escape(room)}: {escape(bar.fate)}</title>"
    parts = [
        f'<text x="0" y="{middle}">{escape(_short(room, ROOM_CHARACTERS))}{title}</text>'
        f'<text x="{LEFT + SCALE + 12}" y="{middle}" style="fill: var(--{good})">'
        f"{escape(_short(f'{bar.short_fate}, {duration(bar.job.seconds)}', FATE_CHARACTERS))}{title}</text>\n"
    ]
    if bar.end is not None:
        x = _x(timeline, max(0.0, bar.start))
        width = max(2.0, round(_x(timeline, bar.end) - x, 1))
        radius = 0 if bar.start < 0 else 3  # a job that ran before has no beginning here
        parts.append(
            f'<rect class="job bar-{good}" x="{x}" y="{top + 5}" width="{width}" height="{BAR}"'
            f' rx="{radius}">{title}</rect>\n'
        )
    if bar.asked is not None:
        x = _x(timeline, bar.asked)
        parts.append(
            f'<line class="asked" x1="{x}" x2="{x}" y1="{top + 1}" y2="{top + BAR + 9}">'
            f"<title>asked to shut down at {duration(bar.asked)}</title></line>\n"
        )
    return "".join(parts)


def _tables(timeline: Timeline) -> str:
    jobs = [
        (
            bar.job.room,
            bar.fate,
            str(bar.job.slot),
            duration(bar.job.seconds),
            "" if bar.end is None else duration(bar.end),
            "" if bar.asked is None else duration(bar.asked),
            bar.job.id,
        )
        for bar in timeline.bars
    ]
    # A phone shows the first two, and the others when the table is moved.
    heads = ("room", "fate", "slot", "length", "ended at", "asked to end at", "job")
    phases = [(span.name, duration(span.start), duration(span.end - span.start)) for span in timeline.phases]
    marks = [(duration(mark.at), mark.text) for mark in timeline.marks]
    return (
        (_table(heads, jobs, kind="jobs") if jobs else "")
        + _table(("phase", "began at", "took"), phases)
        + (_table(("at", "what"), marks) if marks else "")
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "short") -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table class="{kind}">\n<tr>{head}</tr>\n{body}</table></div>\n'


def _list(lines: Sequence[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n"


def _x(timeline: Timeline, at: float) -> float:
    """Return where a time is, inside the scale."""
    return round(LEFT + SCALE * max(0.0, min(1.0, at / timeline.length)), 1)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
