"""`lastcall status` for people: on wide, narrow and low terminals, and while a stop is under way."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from lastcall.supervisor.cli.demo_view import DemoView, next_press, what_next
from lastcall.supervisor.cli.plain_text import status_line, waits_for
from lastcall.supervisor.cli.tables import COLUMNS, status_table
from lastcall.worker.base.plurals import counted


def slot(number: int, *, jobs: int = 0, left: float | None = None, **more: Any) -> dict[str, Any]:
    return {
        "slot": number, "generation": 1, "state": "ready" if left is None else "draining",
        "pid": 4000 + number, "lag_ms": 1.25, "pss_bytes": 150_000_000, "restarts": 0,
        "last_exit": None, "process_failures": 0,
        "drain_left_s": left,
        "jobs": [{"id": f"AJ_{n}", "room": f"room-{number}-{n}", "age_s": float(n)} for n in range(jobs)],
        **more,
    }  # fmt: skip


def status(*slots: dict[str, Any], stop: bool = False) -> dict[str, Any]:
    return {
        "pid": 7, "phase": "draining" if stop else "running", "reason": "SIGTERM" if stop else "",
        "grace_left_s": 45.0 if stop else None, "drain_left_s": 22.0 if stop else None,
        "stop_s": 15.0 if stop else None, "held": False, "full": None, "companions": [], "slots": list(slots),
        "totals": {"started": 9, "finished": 8, "failed": 0, "cut": 0, "lost": 0},
    }  # fmt: skip


def shown(document: dict[str, Any], width: int, height: int | None = None) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(status_table(document, height=height))
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize(
    ("width", "lost"),
    [
        (140, set()),
        (80, set()),
        (64, {"lag ms"}),
        (50, {"lag ms", "gen", "pid", "pss MB"}),
        (40, {"lag ms", "gen", "pid", "pss MB", "restarts"}),
    ],
)
def test_a_narrow_terminal_loses_columns(width: int, lost: set[str]) -> None:
    """Those go first that say least about calls; no line is wider than the terminal."""
    lines = shown(status(slot(0, jobs=3), slot(1)), width)
    head = next(line for line in lines if line.startswith("slot"))
    assert {name for name in COLUMNS if name not in head} == lost
    assert max(map(cell_len, lines)) <= width
    assert any("room-0-0" in line for line in lines)


def test_a_stop_says_how_long_calls_may_stay() -> None:
    """A ruler, and a row for each call that has an end; a call of a worker that goes on has none."""
    lines = shown(
        status(slot(0, jobs=2, left=22.0), slot(1, jobs=1, left=0.0), slot(2, jobs=1), stop=True), 80
    )
    (ruler,) = [line for line in lines if line.startswith("stop  ")]
    assert ruler.endswith("22 s left to calls, 45 s in all")
    bar = ruler.split()[1]
    assert bar.count("━") / len(bar) == pytest.approx(15 / 60, abs=0.05)
    assert bar.index("┊") / len(bar) == pytest.approx(37 / 60, abs=0.05)
    calls = lines[next(n for n, line in enumerate(lines) if line.startswith("call in room")) + 1 :]
    assert [line.split()[0] for line in calls] == ["room-1-0", "room-0-1", "room-0-0"]
    assert [line.split()[3] for line in calls] == ["asked", "22", "22"]


@pytest.mark.parametrize("height", [5, 6, 7, 8, 9, 10, 12, 23, 60])
@pytest.mark.parametrize("stop", [False, True])
def test_rows_beyond_the_screen_are_counted(height: int, stop: bool) -> None:
    """Slots and calls that are not shown are a number; the table is never higher than the screen."""
    slots = [slot(n, jobs=2, left=22.0 if stop else None) for n in range(12)]
    lines = shown(status(*slots, stop=stop), 100, height)
    assert len(lines) <= height
    seen = sum("ready" in line or line.split()[2:3] == ["draining"] for line in lines)
    hidden = next((int(line.split()[1]) for line in lines if line.endswith("jobs") and line[0] == "+"), 0)
    assert seen + hidden == 12
    if stop:
        calls = sum(line.endswith(" 22") for line in lines)
        more = next((int(line.split()[1]) for line in lines if re.fullmatch(r"\+ .* calls?", line)), 0)
        assert calls + more == 24
        assert calls or height < 7, "a row for a call comes before a row for a slot"


def test_one_of_a_thing_is_singular() -> None:
    """A count stands with the noun that fits, in a line of plain text and in the table."""
    assert [counted(n, "process") for n in (0, 1, 2)] == ["0 processes", "1 process", "2 processes"]
    document = status(slot(0, jobs=1, process_failures=1, process_failure="late"), slot(1))
    document["totals"]["started"] = 1
    assert status_line(document).startswith("running: slot 0 ready 1 job, slot 1 ready 0 jobs; 1 started,")
    pool = {"name": "pool", "state": "ready", "connections": 1, "contexts": 1, "waiters": 0, "clients": 1}
    text = "\n".join(shown({**document, "companions": [pool]}, 80, 4))
    parts = ("  1 job, 8 finished", "1 job process did not", "1 connection, 1 context, 0", "1 job connected")
    assert [part for part in parts if part not in text] == []


def test_a_room_can_not_steer_the_terminal() -> None:
    """Its name is shown, and obeyed neither by the terminal nor by rich."""
    jobs = [{"id": "a", "room": "\x1b[2J[bold]x", "age_s": 1.0}]
    text = "\n".join(shown(status({**slot(0, left=1.0), "jobs": jobs}, stop=True), 80))
    assert "\x1b" not in text
    assert text.count("\ufffd[2J[bold]x") == 2


def test_a_verb_says_what_it_waits_for() -> None:
    """The slots that start or drain, and how long each may yet take; the others are not named."""
    starting = slot(1, state="starting", since_s=3.0, start_left_s=117.0)
    assert waits_for(status(slot(0, jobs=2, left=22.0), starting, slot(2))) == (
        "slot 0 draining (2 jobs, at most 22 s yet), slot 1 starting (for 3 s, at most 117 s yet)"
    )
    image = slot(1, state="stopped", since_s=3.0, start_left_s=117.0)
    assert waits_for(status(image)) == "slot 1 starting (for 3 s, at most 117 s yet)"
    assert status_line(status(image)).startswith("running: slot 1 starting 0 jobs; ")
    assert status_line(status(slot(1, state="stopped"))).startswith("running: slot 1 stopped 0 jobs; ")
    older = slot(1, state="starting", since_s=3.0)
    assert waits_for(status(older)) == "slot 1 starting (for 3 s)"
    assert waits_for(status(slot(0, jobs=1, left=5.0))) == "slot 0 draining (1 job, at most 5 s yet)"
    assert waits_for(status(slot(0))) == ""


def test_the_demo_shows_each_call_as_a_bar() -> None:
    """A bar grows with the age of the call. Calls beyond the screen are counted."""
    document = status(slot(0, jobs=5, left=22.0), stop=True)
    console = Console(width=80, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(DemoView(document, call_seconds=4.0, presses=1, height=13))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    bars = [line for line in lines if "room-0-" in line]
    assert [line.split()[0] for line in bars] == ["room-0-4", "room-0-3", "room-0-2"]
    assert [round(line.count("━") / (line.count("━") + line.count("─")), 2) for line in bars] == [
        1,
        0.75,
        0.5,
    ]
    assert lines[-2:] == ["+ 2 more calls", next_press(1)]
    assert max(map(cell_len, [*lines, *what_next()])) <= 80


def test_the_next_press() -> None:
    """Stop, then end the calls, then kill."""
    says = [next_press(presses) for presses in (None, 1, 2, 5)]
    assert [text.split()[1] for text in says] == ["stops:", "asks", "kills", "kills"]
