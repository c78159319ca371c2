"""The supervisor's own log: one event a line, JSON off a terminal, coloured on one."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
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
NO_TEXTS: Mapping[str, str | None] = MappingProxyType({})


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
    """Drops the events of a log for people that tell of states only, and says others in words."""

    def __init__(self, texts: Mapping[str, str | None]) -> None:
        self._texts = texts

    def __call__(self, _logger: object, _method: str, event: dict[str, Any]) -> dict[str, Any]:
        text = self._texts.get(event["event"], event["event"])
        if text is None:
            raise structlog.DropEvent
        event["event"] = text
        return event


def logger(
    writer: OutputWriter, *, console: bool, colours: bool, texts: Mapping[str, str | None] = NO_TEXTS
) -> Any:
    """Return the logger that the whole supervisor is given; structlog's types it loosely itself.

    `texts` are what people read in place of an event; an event whose text is None is not written for them.
    """
    render: Any
    if console:
        render = structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=28)
        stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False)
    else:
        render = structlog.processors.JSONRenderer(default=str)
        stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    people: list[Any] = [_ForPeople(texts)] if console else []  # structlog's type of a processor is loose
    return structlog.wrap_logger(
        _Lines(writer),
        processors=[
            *people,
            structlog.processors.add_log_level,
            stamp,
            structlog.processors.format_exc_info,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
    ).bind(logger="lastcall")
