"""`lastcall demo`: the real supervisor and pool over local servers and a sample agent.

Nothing to configure and nothing beyond loopback.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lastcall.supervisor.app import App
from lastcall.supervisor.cli.local_server import local_server
from lastcall.supervisor.cli.tables import receipt_table, status_table
from lastcall.supervisor.config import Config, Inworld
from lastcall.supervisor.environment import surroundings
from lastcall.supervisor.processes.output_writer import OutputWriter
from lastcall.supervisor.signals import Inbox
from lastcall.supervisor.views.status import Status
from lastcall.worker import local
from lastcall.worker.base.clock import now
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.settings import WorkerSettings

# Seconds, all ours: a drain that can be watched, calls that end within it, and a table that moves.
GRACE = 30.0
CALL_SECONDS = 4.0
REFRESH_INTERVAL = 0.25
LINE_INTERVAL = 2.0
SAMPLE = "local/sample.py"


async def demo(inbox: Inbox, *, workers: int, rate: float, seconds: float | None) -> Exit:
    """Run the demo until a signal, or for `seconds`, and return the exit code of its stop."""
    console = Console(file=sys.stdout)
    calls = ["--rate", str(rate), "--seconds", str(CALL_SECONDS)]
    async with (
        local_server("lastcall.worker.local", calls) as server,
        local_server("lastcall.worker.local.inworld_server", []) as speech,
    ):
        config = Config(
            target=os.path.join(os.path.dirname(local.__file__), os.path.basename(SAMPLE)),
            workers=workers,
            grace=GRACE,
            http="127.0.0.1:0",
            log_format="console",
            inworld=Inworld(enabled=True, ws_url=speech.where["ws_url"], base_url=speech.where["base_url"]),
        )
        screen = _Screen(console) if console.is_terminal else None
        around = surroundings(
            environment={**os.environ, **server.environment, **speech.environment},
            worker_settings=WorkerSettings(mock_room=True),
            spared_pids=frozenset({server.pid, speech.pid}),
            quiet_workers=True,
            quiet_receipt=True,  # it is shown below, for people
            **({"stderr": screen} if screen is not None else {}),
        )
        app = App(config, inbox, around)
        if screen is None:
            around.stdout.write(
                b"lastcall demo: local dispatch and Inworld servers, a sample agent; Ctrl-C stops\n"
            )
        async with asyncio.TaskGroup() as group:
            shown = (
                screen.follow(app.status) if screen is not None else _lines(app.status, around.stdout.write)
            )
            showing = group.create_task(shown)
            timing = group.create_task(_stop_after(app, seconds))
            code = await app.run()
            showing.cancel()
            timing.cancel()
        if screen is not None:
            screen.close()
            console.print(receipt_table(app.receipt))
        else:
            around.stdout.write(_plain_receipt(app.receipt))
            around.stdout.flush(1.0)
    return code


class _Screen(OutputWriter):
    """A live table at the bottom of a terminal, the supervisor's log lines above it."""

    def __init__(self, console: Console) -> None:
        self.dropped = 0
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._live.start()

    def write(self, data: bytes) -> None:
        for line in data.decode(errors="replace").splitlines():
            self._console.print(Text.from_ansi(line), soft_wrap=True)

    def take_dropped(self) -> int:
        return 0

    def flush(self, timeout: float) -> bool:
        return True

    def close(self) -> None:
        """Take the table away and give the terminal back as it was."""
        self._live.stop()

    async def follow(self, status: Status) -> None:
        """Redraw the table a few times a second; the terminal is restored however this ends."""
        try:
            while True:
                self._live.update(status_table(status.document()), refresh=True)
                await asyncio.sleep(REFRESH_INTERVAL)
        finally:
            self._live.stop()


async def _lines(status: Status, write: Callable[[bytes], None]) -> None:
    """Off a terminal: one plain line every few seconds."""
    began = now()
    while True:
        await asyncio.sleep(LINE_INTERVAL)
        document = status.document()
        slots = ", ".join(f"slot {s['slot']} {s['state']} {len(s['jobs'])} jobs" for s in document["slots"])
        totals = ", ".join(f"{n} {name}" for name, n in document["totals"].items() if name != "unassigned")
        write(f"{now() - began:5.0f} s  {document['phase']}: {slots}; {totals}\n".encode())


def _plain_receipt(receipt: dict[str, Any]) -> bytes:
    totals = ", ".join(f"{n} {name}" for name, n in receipt["totals"].items() if name != "unassigned")
    at_stop = len(receipt["jobs"])
    line = (
        f"receipt: {receipt['outcome']}, exit code {receipt['exit_code']}, {receipt['seconds']:.1f} s;"
        f" {at_stop} jobs were running when the stop began; all: {totals}; processes left {receipt['left']}\n"
    )
    return line.encode()


async def _stop_after(app: App, seconds: float | None) -> None:
    if seconds is not None:
        await asyncio.sleep(seconds)
        app.stop(f"the demo's {seconds:g} s are over")
