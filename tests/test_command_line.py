"""Command lines: most are read without typer, and mean what they mean to typer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lastcall.supervisor.cli import command_line, operate, plain_words, run
from lastcall.supervisor.errors import UsageError

VERBS: dict[str, Callable[..., Any]] = {**run.VERBS, **operate.VERBS}
WORDS = [
    "app.py",
    "-m",
    "agent",
    "--workers",
    "-w",
    "-w3",
    "3",
    "-3",
    "0",
    "1.5",
    "--grace",
    "--grace=5",
    "--wait",
    "--wait=1",
    "--wai",
    "--handover",
    "--control",
    "c.sock",
    "--http",
    "off",
    "--json",
    "--watch",
    "*.md",
    "--seconds",
    "--rate",
    "--config",
    "--args",
    "[]",
    "-",
    "",
    "=",
    "--",
    "-x",
    "--no-such",
    "é",
    "\u0663",
]


def read_by_typer(name: str, verb: Callable[..., Any], words: list[str]) -> dict[str, Any] | None:
    """Return the values that typer gives to a verb; None where it refuses the words."""
    seen: dict[str, Any] = {}

    def record(**values: Any) -> None:
        seen.update(values)

    record.__signature__ = inspect.signature(verb, eval_str=True)  # type: ignore[attr-defined]  # as inspect documents
    app = command_line.new()
    command_line.add(app, name, record)
    try:
        command_line.read(app, [name, *words], None)
    except UsageError:
        return None
    return seen


@pytest.mark.parametrize("name", VERBS)
def test_words_mean_the_same_without_typer(name: str) -> None:
    """Typer reads each line that is read without typer, with the same values; the others are left to it."""
    verb = VERBS[name]
    defaults = {
        each.name: each.default
        for each in inspect.signature(verb).parameters.values()
        if each.name != "session"
    }

    @settings(max_examples=60)
    @given(st.lists(st.sampled_from(WORDS), max_size=5))
    def check(words: list[str]) -> None:
        values = plain_words.read(verb, words)
        if values is None:
            return
        read = read_by_typer(name, verb, words)
        assert read is not None
        read.pop("session", None)
        assert {key: values.get(key, defaults[key]) for key in read} == read

    check()


def test_plain_words_are_read() -> None:
    """Options in any order, short ones, flags, numbers and arguments; help and mistakes are typer's."""
    line = ["--wait", "7", "--control", "x"]
    assert plain_words.read(VERBS["scale"], line) == {"workers": 7, "wait": True, "control": "x"}
    line = ["-w", "2", "--grace=5", "app.py", "--watch", "a", "--watch", "b"]
    values = {"workers": "2", "grace": "5", "target": "app.py", "watch": ["a", "b"]}
    assert plain_words.read(VERBS["dev"], [*line[2:]]) == {
        key: values[key] for key in ("grace", "target", "watch")
    }
    assert plain_words.read(VERBS["run"], line[:4]) == {
        key: values[key] for key in ("workers", "grace", "target")
    }
    for words in (["--help"], ["x"], ["--wait", "7", "8"], ["7", "--no-such"], ["7", "--control"], []):
        assert plain_words.read(VERBS["scale"], words) is None
