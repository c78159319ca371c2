"""`lastcall receipt`: what is read, how a stop is laid out, and how it is drawn."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from lastcall.supervisor.errors import UsageError
from lastcall.supervisor.picture.page import Section, page, section_of
from lastcall.supervisor.picture.reading import check, find, printable, read
from lastcall.supervisor.picture.terminal import StopPicture
from lastcall.supervisor.picture.timeline import duration, lay_out, ticks
from lastcall.supervisor.receipt import JobEntry, Ledger, StopRecord, write
from lastcall.worker.base.budget import Shares, plan
from tests.support.receipts import HOSTILE, cut_stop, job


def drawn(document: dict[str, Any], width: int, **options: Any) -> list[str]:
    """Return the lines of a picture without the blanks at their ends."""
    console = Console(width=width, file=io.StringIO(), color_system=None, **options)
    with console.capture() as capture:
        console.print(StopPicture(lay_out(check(document, "it"))))
    return [line.rstrip() for line in capture.get().splitlines()]


def lines_of(text: str, name: str = "the file") -> str:
    """Return the error of a source, which has one line."""
    with pytest.raises(UsageError) as caught:
        find(io.BytesIO(text.encode()), name)
    error = str(caught.value)
    assert "\n" not in error
    return error


# -- what is read -------------------------------------------------------------------------------------


def test_what_a_supervisor_writes_is_read() -> None:
    """The times count from the beginning of the stop, and a job that was asked to shut down says when."""
    record, ledger = StopRecord(), Ledger()
    ledger.start(JobEntry(id="a", room="r", dispatch_id="d", slot=0, generation=1, accepted_at=90.0))
    ledger.start(JobEntry(id="b", room="r", dispatch_id="d", slot=0, generation=1, accepted_at=95.0))
    ledger.begin_stop()
    record.begin("SIGINT", 100.0, plan(100.0, 60.0, Shares()))
    record.ask("hurry", 103.0)
    ledger.end(0, 1, "a", "finished", 12.5)
    ledger.cut(0, 1, "b", 103.0)
    ledger.end(0, 1, "b", "cut", 9.0)
    record.seconds = 4.0
    receipt = check(json.loads(json.dumps(write(record, ledger, grace=60.0, pid=1))), "it")
    assert [(each.ended_after, each.asked_after) for each in receipt.jobs] == [(2.5, None), (4.0, 3.0)]
    assert [(each.what, each.after) for each in receipt.asked] == [("stop", 0.0), ("hurry", 3.0)]
    assert receipt.deadlines["end"] == 60.0 > receipt.deadlines["drain"] > 30.0


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(cut_stop(), indent=2),
        json.dumps(cut_stop()),
        json.dumps({"event": "receipt", "receipt": cut_stop()}),
        'noise\n{"event": "ready"}\n{"event": "receipt", "receipt": {broken\n'
        + "Jan 02 03:04:05 host lastcall[7]: "
        + json.dumps({"receipt": cut_stop(), "event": "receipt"})
        + "\nlater lines\n",
    ],
    ids=["file", "one line", "log line", "journal"],
)
def test_sources(text: str) -> None:
    """A file of --receipt, the same in one line, a line of the log, and a log with other lines."""
    assert find(io.BytesIO(text.encode()), "it").receipt.seconds == 38.2


def test_the_last_receipt_of_a_log_counts() -> None:
    """And the number of receipts is known."""
    log = "".join(json.dumps({"receipt": cut_stop(pid=pid), "event": "receipt"}) + "\n" for pid in (1, 2, 3))
    found = find(io.BytesIO(log.encode()), "it")
    assert (found.receipt.pid, found.count) == (3, 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty"),
        (" \n \n", "the file is empty"),
        ("a log\nwithout any\n", "the file has no receipt"),
        ('{"event": "ready"}\n', "the file has no receipt"),
        (json.dumps(cut_stop(), indent=2)[:300], "the file is cut off"),
        (json.dumps(cut_stop())[:300], "the file is cut off"),
        ('{\n"a": 1,,\n}', "line 2"),
        ('{\n"a": 1\n}', "the file is no receipt"),
        (json.dumps(cut_stop(schema=2), indent=2), "schema 2, of a newer lastcall"),
        (json.dumps(cut_stop(seconds="long"), indent=2), "no receipt: seconds: "),
        (json.dumps(cut_stop(seconds=float("nan")), indent=2), "no receipt: seconds: "),
        (json.dumps(cut_stop(jobs=[{"id": "a"}]), indent=2), "no receipt: jobs.0.room: "),
        (json.dumps(cut_stop(phases={"drain\x1b[2Jing": None}), indent=2), "phases.drain\ufffd[2Jing"),
        ('{\n"outcome": ' + "[" * 100_000, "the file is"),
        ('{\n"outcome": ' + "9" * 10_000 + "\n}", "the file is no receipt"),
    ],
)
def test_no_receipt(text: str, says: str) -> None:
    """The error is one line with the name of the source, and says what to do."""
    error = lines_of(text)
    assert error.startswith("receipt: the file ")
    assert says in error


@given(st.text())
def test_any_text_is_a_receipt_or_one_line(text: str) -> None:
    """No text ends in a traceback."""
    assert lines_of(text)


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    """The line has the file, and the system's reason."""
    for place, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UsageError, match=why) as caught:
            read(str(place))
        assert str(place) in str(caught.value)
    with pytest.raises(UsageError, match="can't be read"):
        read("a\0b")


def test_text_can_not_steer_the_terminal() -> None:
    """Escape sequences, line ends and marks that turn the direction of writing are replaced."""
    assert printable("a\x1b[2J\r\nb\u202ec") == "a\ufffd[2J\ufffd\ufffdb\ufffdc"
    assert len(printable("x" * 10_000)) == 500
    room = "\x1b]0;title\x07[bold]r[/]"
    (line,) = [each for each in drawn(cut_stop(jobs=[job("a", room, 1, "cut")]), 80) if "[bold]" in each]
    assert line.startswith("\ufffd]0;title\ufffd[bold]r[/]")


# -- the layout ---------------------------------------------------------------------------------------


def test_the_deadline_sets_the_scale_when_it_is_near() -> None:
    """A deadline far behind the end is one line of text."""
    near = lay_out(check(cut_stop(seconds=20.0, jobs=[], phases={"draining": 20.0}), "it"))
    assert near.length == 37.0
    assert [mark.is_deadline for mark in near.marks] == [False, True]
    far = lay_out(check(cut_stop(seconds=2.0, jobs=[], phases={"draining": 2.0}), "it"))
    assert far.length == 2.0
    assert far.facts[0] == "jobs had until 37 s to end, beyond the right edge"


def test_the_phases_end_with_the_stop() -> None:
    """They stand one after the other."""
    spans = lay_out(check(cut_stop(), "it")).phases
    assert [(span.name, round(span.start, 2)) for span in spans] == [
        ("fencing", 0.0), ("draining", 0.01), ("closing", 37.0), ("sweeping", 38.0),
    ]  # fmt: skip
    assert spans[-1].end == pytest.approx(38.2)


def test_jobs_that_were_harmed_come_first() -> None:
    """Then the jobs that ended last."""
    rooms = [bar.job.room for bar in lay_out(check(cut_stop(), "it")).bars]
    assert rooms == ["a long room", "r0", HOSTILE, "会議室"]


def test_what_was_not_in_order_is_said() -> None:
    """A fault, a missing acknowledgement, a leak, and processes."""
    document = cut_stop(
        fault="a bug", fence_unacknowledged=[1, 2], killed=[{"pid": 1}], left=2,
        resources=[
            {"name": "livekit", "fate": "forced", "slot": 1, "counts": {}},
            {"name": "inworld-pool", "fate": "closed", "counts": {"connections": {"closed": 3}}},
        ],
    )  # fmt: skip
    assert lay_out(check(document, "it")).facts == (
        "fault: a bug",
        "no answer to the fence from slot 1, 2: its event loop was blocked",
        "livekit of slot 1: forced",
        "inworld-pool: closed (connections closed 3)",
        "all jobs since the start: 10 started, 9 finished, 1 cut",
        "processes: 1 killed, 1 swept, 2 left",
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.0123, "0.012 s"), (3.44, "3.4 s"), (36.99, "37 s"), (120, "2 min"), (125, "2 min 5 s"),
        (3600, "1 h"), (3725, "1 h 2 min 5 s"), (-2.5, "-2.5 s"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    """As people say them."""
    assert duration(seconds) == text


@given(st.floats(0.1, 1e9), st.integers(1, 20))
def test_ticks_are_few_and_inside(length: float, count: int) -> None:
    """From 0 on, in equal steps."""
    times = ticks(length, count)
    assert times[0] == 0
    assert 1 <= len(times) <= count + 1
    assert times[-1] <= length * 1.001


# -- the picture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_picture_fits(width: int) -> None:
    """Every line is as wide as the terminal at most; each job is a line with its fate."""
    lines = drawn(cut_stop(), width)
    assert max(map(cell_len, lines)) <= width
    assert [line.split()[-1] for line in lines if "━" in line or "╸" in line][:3] == [
        "cut", "finished", "finished",
    ]  # fmt: skip


def test_the_bars_are_where_their_times_are() -> None:
    """A job that ran before has no beginning; one that was cut has a cross at the time of the request."""
    lines = drawn(cut_stop(), 100)
    long, r0 = (next(line for line in lines if line.startswith(name)) for name in ("a long", "r0"))
    assert long.index("◂") == r0.index("◂")
    share = (r0.index("╸") - r0.index("◂")) / (long.index("╸") - long.index("◂"))
    assert share == pytest.approx(12.2 / 38.0, abs=0.03)
    assert long.index("╋") == r0.index("┊")


def test_a_terminal_without_those_characters() -> None:
    """The picture is drawn with ASCII."""
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    console = Console(width=80, file=file, color_system=None)
    console.print(StopPicture(lay_out(check(cut_stop(), "it"))))
    file.seek(0)
    text = file.read()
    assert "|" in text and "=====" in text
    assert not {"━", "│", "▼"} & set(text)


def test_an_older_receipt_has_no_bars() -> None:
    """It does not say when its jobs ended, and the picture says that."""
    jobs = [job("AJ_1", "r0", 20.0, "finished")]
    lines = drawn({**cut_stop(jobs=jobs), "deadlines": {}, "asked": []}, 80)
    assert any("does not say when it ended" in line for line in lines)
    assert not any("━" in line for line in lines)


def test_an_empty_stop() -> None:
    """No job, no phase, no time."""
    lines = drawn(cut_stop(jobs=[], phases={}, seconds=0.0, deadlines={}, asked=[], totals={}), 80)
    assert "no job was running" in lines
    assert "all jobs since the start: none" in lines


# -- the page -----------------------------------------------------------------------------------------


def test_everything_on_the_page_is_escaped() -> None:
    """A receipt adds no element and no attribute to the page."""
    evil = '"><script>1</script>'
    document = cut_stop(
        reason=evil, outcome=evil, at=evil, fault=evil, totals={evil: 1},
        phases={evil: 1.0}, asked=[{"for": evil, "after": 1.0}],
        jobs=[job(evil, evil, 1.0, evil, ended_after=1.0, process=evil), job("b", HOSTILE, 1.0, None)],
        resources=[{"name": evil, "fate": evil, "counts": {evil: {evil: 1}}}],
    )  # fmt: skip
    section = section_of(lay_out(check(document, "it")))
    text = page(evil, [section, Section(title=evil, is_good=False, text=evil, notes=(evil,))])
    assert "<script" not in text and "<img" not in text
    assert text.count("&lt;script&gt;") > 20
    assert "http://" not in text and "https://" not in text


# -- the verb -----------------------------------------------------------------------------------------


def lastcall(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lastcall", "receipt", *words],
        input=stdin, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_verb(tmp_path: Path) -> None:
    """A picture without colours in a pipe, a page, and one line for what is wrong."""
    file = tmp_path / "receipt.json"
    file.write_text(json.dumps(cut_stop(), indent=2))
    shown = lastcall(str(file))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("cut  exit code 75")
    assert "\x1b" not in shown.stdout
    out = tmp_path / "stop.html"
    assert lastcall("-", "--html", str(out), stdin=file.read_text()).returncode == 0
    assert out.read_text().startswith("<!DOCTYPE html>")
    wrong = lastcall(str(file), "--html", str(tmp_path / "none" / "stop.html"))
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("lastcall: --html: no directory")
    assert wrong.stderr.count("\n") == 1
