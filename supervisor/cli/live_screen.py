"""A terminal with a live picture at the bottom, and log lines that scroll above the picture."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from lastcall.supervisor.processes.output_writer import OutputWriter

# Seconds. Ours: the picture moves, and the terminal has little to do.
REFRESH_INTERVAL = 0.25
# Errors of a terminal that is gone, or has no character for what is shown.
NOT_SHOWN = (OSError, UnicodeError)


class LiveScreen(OutputWriter):
    """Takes the supervisor's log lines in place of standard error, and shows a picture below them."""

    def __init__(self, console: Console) -> None:
        self.dropped = 0
        self.breaks_lines = False
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._live.start()

    def write(self, data: bytes) -> None:
        with contextlib.suppress(*NOT_SHOWN):
            for line in data.decode(errors="replace").splitlines():
                self._console.print(Text.from_ansi(line))  # rich breaks a line between words

    def take_dropped(self) -> int:
        return 0

    def flush(self, timeout: float) -> bool:
        return True

    def close(self) -> None:
        """Take the picture away and give the terminal back as it was."""
        with contextlib.suppress(*NOT_SHOWN):
            self._live.stop()

    async def follow(self, draw: Callable[[], RenderableType]) -> None:
        """Redraw the picture a few times a second; the terminal is restored however this ends."""
        try:
            while True:
                self._live.update(draw(), refresh=True)
                await asyncio.sleep(REFRESH_INTERVAL)
        finally:
            self._live.stop()
