"""A terminal with a live table at the bottom, and log lines that scroll above the table."""

from __future__ import annotations

import asyncio
import contextlib

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lastcall.supervisor.cli.tables import status_table
from lastcall.supervisor.processes.output_writer import OutputWriter
from lastcall.supervisor.views.status import Status

# Seconds. Ours: the table moves, and the terminal has little to do.
REFRESH_INTERVAL = 0.25
# Errors of a terminal that is gone, or has no character for what is shown.
NOT_SHOWN = (OSError, UnicodeError)


class LiveScreen(OutputWriter):
    """Takes the supervisor's log lines in place of standard error, and shows its status below them."""

    def __init__(self, console: Console) -> None:
        self.dropped = 0
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._live.start()

    def write(self, data: bytes) -> None:
        with contextlib.suppress(*NOT_SHOWN):
            for line in data.decode(errors="replace").splitlines():
                self._console.print(Text.from_ansi(line), soft_wrap=True)

    def take_dropped(self) -> int:
        return 0

    def flush(self, timeout: float) -> bool:
        return True

    def close(self) -> None:
        """Take the table away and give the terminal back as it was."""
        with contextlib.suppress(*NOT_SHOWN):
            self._live.stop()

    async def follow(self, status: Status) -> None:
        """Redraw the table a few times a second; the terminal is restored however this ends."""
        try:
            while True:
                self._live.update(status_table(status.document()), refresh=True)
                await asyncio.sleep(REFRESH_INTERVAL)
        finally:
            self._live.stop()
