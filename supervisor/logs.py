"""The supervisor's own log: one event a line, JSON off a terminal, coloured on one."""

from __future__ import annotations

import os
import sys
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


def logger(writer: OutputWriter, *, console: bool, colours: bool) -> Any:
    """Return the logger that the whole supervisor is given; structlog's types it loosely itself."""
    render: Any
    if console:
        render = structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=28)
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
