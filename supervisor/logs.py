"""The supervisor's own log: one event a line, JSON off a terminal, coloured on one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from lastcall.supervisor.processes.output_writer import OutputWriter

# structlog imports rich and pygments if it finds them, for tracebacks that are never drawn here: 5 MB of
# resident memory in a process that lives for months. It does without when they can't be imported.
_without_rich = "rich" not in sys.modules
if _without_rich:
    sys.modules["rich"] = None  # type: ignore[assignment]  # the documented way to make an import fail
import structlog  # noqa: E402

if _without_rich:
    del sys.modules["rich"]

Format = Literal["auto", "json", "console"]
# In place of an event for people: a text, or a function that makes one of the event's keys. With None the
# event has no line.
Text = str | Callable[[dict[str, Any]], str] | None
NO_TEXTS: Mapping[str, Text] = MappingProxyType({})
# Keys that say nothing to people: they know which program they run, and see each state as it comes.
NOT_FOR_PEOPLE = ("logger", "was")
DIM, BOLD, RED, YELLOW, CYAN, RESET = (f"\x1b[{code}m" for code in (2, 1, 31, 33, 36, 0))
LEVEL_COLOURS = {"warning": YELLOW, "error": RED}


def is_console(format: Format, fd: int) -> bool:
    """Tell whether lines are for people: asked for, or a terminal and nothing else asked for."""
    return format == "console" or (format == "auto" and os.isatty(fd))


class _Lines:
    """The file that structlog writes its lines of text to."""

    def __init__(self, writer: OutputWriter) -> None:
        self._writer = writer

    def msg(self, message: str) -> None:
        self._writer.write(message.encode(errors="backslashreplace") + b"\n")

    debug = info = warning = error = critical = msg


class _ForPeople:
    """Says an event in words, with the time and the keys. Values of many lines stand below."""

    def __init__(self, texts: Mapping[str, Text], *, colours: bool) -> None:
        self._texts = texts
        self._colours = colours

    def __call__(self, _logger: object, _method: str, event: dict[str, Any]) -> str:
        text = self._texts.get(event["event"], event["event"])
        if text is None:
            raise structlog.DropEvent
        words = text if isinstance(text, str) else _made(text, event)
        level = event.pop("level")
        colour = LEVEL_COLOURS.get(level, "")
        warned = f"{self._in(colour, f'{level}:')} " if colour else ""
        line = f"{self._in(DIM, event.pop('timestamp'))} {warned}{self._in(BOLD, _printable(words))}"
        below = []
        for key, value in event.items():
            if key in NOT_FOR_PEOPLE or key == "event":
                continue
            shown = str(value)
            if "\n" in shown:
                below += [f"    {_printable(each)}" for each in shown.splitlines()]
            else:
                shown = shown if shown.isprintable() and " " not in shown else repr(shown)
                line += f" {self._in(CYAN, key)}={shown}"
        return "\n".join([line, *below])

    def _in(self, colour: str, text: str) -> str:
        return f"{colour}{text}{RESET}" if self._colours else text


def _made(make: Callable[[dict[str, Any]], str], event: dict[str, Any]) -> str:
    """Return the text of an event. The event as it is stands in for one that has other keys than expected.

    A line of the log is no reason for a fault in the supervisor.
    """
    taken = dict(event)
    try:
        words = make(taken)
    except (LookupError, TypeError, ValueError):
        return str(event["event"])
    for key in event.keys() - taken.keys():
        del event[key]
    return words


def _printable(text: str) -> str:
    """Return a text without the characters that a terminal obeys."""
    return "".join(each if each.isprintable() else "\ufffd" for each in text)


def logger(
    writer: OutputWriter, *, console: bool, colours: bool, texts: Mapping[str, Text] = NO_TEXTS
) -> Any:
    """Return the logger that the whole supervisor is given; structlog's types it loosely itself.

    With `console` the lines are for people, and `texts` stand in place of events.
    """
    render: Any
    if console:
        render = _ForPeople(texts, colours=colours)
        stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
    else:
        render = structlog.processors.JSONRenderer(default=str)
        stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    return structlog.wrap_logger(
        _Lines(writer),
        processors=[
            structlog.processors.add_log_level,
            stamp,
            structlog.processors.format_exc_info,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
    ).bind(logger="lastcall")
