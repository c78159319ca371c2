"""The log for people: sentences in place of states, and lines that no terminal breaks inside a word."""

from __future__ import annotations

import json
import re
import termios
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastcall.supervisor import logs
from lastcall.supervisor.processes.line_breaks import INDENT, NARROWEST, broken, cells
from lastcall.supervisor.processes.output_writer import OutputWriter
from lastcall.supervisor.sentences import SENTENCES, receipt_sentence
from tests.support.receipts import cut_stop, job
from tests.support.terminal import Terminal


class Lines:
    """Takes the bytes that a logger writes."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, data: bytes) -> None:
        self.text += data.decode()


def logged(
    event: str, *, colours: bool = False, console: bool = True, level: str = "info", **keys: Any
) -> str:
    """Return what the log has of one event."""
    lines = Lines()
    log = logs.logger(lines, console=console, colours=colours, texts=SENTENCES)  # type: ignore[arg-type]  # it writes
    getattr(log, level)(event, **keys)
    return lines.text


def test_one_line_for_one_thing() -> None:
    """States that follow from another are in the JSON log only, under their names."""
    for event, text in SENTENCES.items():
        if text is None:
            assert logged(event, slot=0) == ""
            assert json.loads(logged(event, console=False, slot=0))["event"] == event
    line = logged("stop fencing", reason="SIGTERM", jobs=2, grace_s=60.0)
    assert line.endswith("stopping (SIGTERM): no new job is accepted, 2 jobs end by themselves, grace 60 s\n")
    assert "accepted, no job runs, grace" in logged("stop fencing", reason="SIGINT", jobs=0, grace_s=1.5)
    assert json.loads(logged("stop fencing", console=False, jobs=2))["jobs"] == 2


def test_a_sentence_that_lacks_a_key() -> None:
    """The event is written as it is: a line of the log is no reason for a fault."""
    assert logged("stop fencing", jobs=2).endswith("stop fencing jobs=2\n")


def test_values_of_a_line() -> None:
    """Control characters reach no terminal, and a text of many lines stands below."""
    line = logged("target failed", level="error", reason="a b", room="\x1b[2J", traceback="one\n  two\x07\n")
    head, *below = line.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d error: target failed reason='a b' room='\\x1b\[2J'", head)
    assert below == ["    one", "      two\ufffd"]
    assert "\x1b[31merror:\x1b[0m" in logged("target failed", level="error", colours=True)


def test_the_receipt_is_a_sentence() -> None:
    """The outcome, the time, the fates of the jobs, and processes that had to be ended."""
    assert receipt_sentence(cut_stop()) == (
        "receipt: cut, exit code 75, 38.2 s of 60 s; 4 jobs were running when the stop began: 3 finished, 1"
        " cut; processes swept 1, processes left 0"
    )
    one = cut_stop(jobs=[job("AJ_1", "r", 1.0, "handed_over")], swept=0, fault="OSError(28)")
    assert receipt_sentence(one).endswith(
        "; 1 job was running when the stop began: 1 handed over; processes left 0; fault: OSError(28)"
    )
    wrong = receipt_sentence(cut_stop(fault="no such file", exit_code=78))
    assert "no such file" not in wrong, "the failed slot has said it, and the last line says it"
    assert "0 jobs were running when the stop began; " in receipt_sentence(cut_stop(jobs=[]))
    assert "{" not in logged("receipt", receipt=cut_stop())
    assert json.loads(logged("receipt", console=False, receipt=cut_stop()))["receipt"] == cut_stop()


TEXT = st.text(st.sampled_from("ab é字\u0301 "), max_size=200)


@given(TEXT, st.integers(0, 60))
def test_a_line_is_broken_between_words(line: str, width: int) -> None:
    """Each part fits, unless it begins with a word that does not. The words are those of before."""
    parts = broken(line, width).split("\n")
    assert " ".join(parts).split() == line.split()
    if width < NARROWEST:
        assert parts == line.split("\n")
        return
    indent = min(INDENT, width // 3)
    wide = [part for part in parts if cells(part.rstrip()) > width]
    assert all(cells(part.split()[0]) > width - indent for part in wide if part.split()), parts
    assert all(part.startswith(" " * indent) for part in parts[1:])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("short", "short"),
        ("one two three four", "one two\n    three\n    four"),
        ("    four spaces stay in front", "    four\n    spaces\n    stay in\n    front"),
        ("\x1b[31mone two\x1b[0m three", "\x1b[31mone two\x1b[0m\n    three"),
        ("a-word-that-is-wider-than-all b", "a-word-that-is-wider-than-all b"),
        ("a progress bar\r of a program", "a progress bar\r of a program"),
        ("\x1b[2Jclears the screen", "\x1b[2Jclears the screen"),
    ],
)
def test_where_a_line_is_broken(line: str, expected: str) -> None:
    """Colours take no room, and a line with other control characters is left to the program."""
    assert broken(line, 12) == expected


def test_a_writer_breaks_lines_on_a_terminal(terminal: Terminal) -> None:
    """With the width of the moment. A terminal without a size gets what was written, as other bytes do."""
    writer = OutputWriter(terminal.slave)
    writer.breaks_lines = True
    writer.write(b"a line for a terminal that has no size\n")
    assert writer.flush(5)
    termios.tcsetwinsize(terminal.slave, (24, 30))
    writer.write(b"a line as a person reads it on a terminal \xff\n")
    assert writer.flush(5)
    writer.breaks_lines = False
    writer.write(b"a line as a program wrote it to its output\n")
    expected = (
        b"a line for a terminal that has no size\r\n"
        b"a line as a person reads it on\r\n    a terminal \xff\r\n"
        b"a line as a program wrote it to its output\r\n"
    )
    deadline = time.monotonic() + 10
    while len(terminal.read()) < len(expected) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert terminal.read() == expected
