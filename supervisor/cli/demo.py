"""`lastcall demo`: the real supervisor and pool over local servers and a sample agent.

The demo needs no configuration and reaches nothing beyond loopback.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lastcall.supervisor.app import App
from lastcall.supervisor.cli.beside import run_with
from lastcall.supervisor.cli.demo_view import DemoView, what_next
from lastcall.supervisor.cli.live_screen import LiveScreen
from lastcall.supervisor.cli.local_server import local_server
from lastcall.supervisor.cli.plain_text import status_line, totals_text
from lastcall.supervisor.config.options import Config, Inworld
from lastcall.supervisor.environment import surroundings
from lastcall.supervisor.fleet.footprints import LOOK_FOR_STATUS_EVERY
from lastcall.supervisor.picture.reading import check
from lastcall.supervisor.picture.terminal import StopPicture
from lastcall.supervisor.picture.timeline import lay_out
from lastcall.supervisor.sentences import receipt_sentence
from lastcall.supervisor.signals import Inbox
from lastcall.supervisor.views.status import Status
from lastcall.worker import local
from lastcall.worker.base.clock import now
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.settings import WorkerSettings

# Seconds, all ours: a drain that can be watched, calls that end within it, and lines that can be read.
GRACE = 45.0
CALL_SECONDS = 4.0
LINE_INTERVAL = 2.0
# Seconds for the last line to be written. Ours: standard output may be a pipe that nobody reads.
FLUSH_TIMEOUT = 1.0


async def demo(inbox: Inbox, *, workers: int, rate: float, seconds: float | None) -> Exit:
    """Run the demo until a signal, or for `seconds` with a worker, and return the exit code of its stop."""
    console = Console(file=sys.stdout)
    calls = ["--rate", str(rate), "--seconds", str(CALL_SECONDS)]
    async with (
        local_server("lastcall.worker.local", calls) as server,
        local_server("lastcall.worker.local.inworld_server", []) as speech,
    ):
        config = Config(
            target=str(Path(local.__file__).with_name("sample.py")),
            workers=workers,
            grace=GRACE,
            http="127.0.0.1:0",
            log_format="console",
            inworld=Inworld(enabled=True, ws_url=speech.where["ws_url"], base_url=speech.where["base_url"]),
        )
        screen = LiveScreen(console) if console.is_terminal else None
        around = surroundings(
            environment={**os.environ, **server.environment, **speech.environment},
            worker_settings=WorkerSettings(local_url=server.environment["LIVEKIT_URL"]),
            spared_pids=frozenset({server.pid, speech.pid}),
            quiet_workers=True,
            quiet_receipt=True,  # the receipt is shown below, for people
            **({"stderr": screen} if screen is not None else {}),
        )
        app = App(config, inbox, around)
        if screen is None:
            around.stdout.write(
                b"lastcall demo: local dispatch and Inworld servers, a sample agent; Ctrl-C stops\n"
            )

        def draw() -> DemoView:
            stop = app.shutdown.stop
            return DemoView(
                app.status.document(),
                call_seconds=CALL_SECONDS,
                presses=None if stop is None else stop.presses,
                height=console.height,
            )

        async def show() -> None:
            await (screen.follow(draw) if screen else _write_lines(app.status, around.stdout.write))

        beside = {"the table": show, "the clock": lambda: _stop_after(app, seconds)}
        code = await run_with(app, beside | {"the memory": lambda: _look_at_memory(app)})
        if screen is not None:
            screen.close()
            console.print(StopPicture(lay_out(check(app.receipt, "the receipt"))))
            console.print("\n".join(["", *what_next()]), highlight=False, soft_wrap=True)
        else:
            line = f"{receipt_sentence(app.receipt)}; all: {totals_text(app.receipt)}"
            around.stdout.write("\n".join([line, *what_next(), ""]).encode())
            around.stdout.flush(FLUSH_TIMEOUT)
    return code


async def _write_lines(status: Status, write: Callable[[bytes], None]) -> None:
    """Off a terminal: write one plain line every few seconds."""
    began = now()
    while True:
        await asyncio.sleep(LINE_INTERVAL)
        write(f"{now() - began:5.0f} s  {status_line(status.document())}\n".encode())


async def _look_at_memory(app: App) -> None:
    """Have figures of memory for the table, as `lastcall status` has."""
    while True:
        await asyncio.sleep(LOOK_FOR_STATUS_EVERY)
        await app.footprints.look(LOOK_FOR_STATUS_EVERY)


async def _stop_after(app: App, seconds: float | None) -> None:
    if seconds is not None:
        # On a busy machine a start takes longer than the demo is to last, and there would be no call to see.
        due = now() + app.fleet.config.start.timeout
        await app.fleet.changed.until(lambda: app.fleet.works, lambda: due)
        await asyncio.sleep(seconds)
        app.stop(f"the demo's {seconds:g} s are over")
