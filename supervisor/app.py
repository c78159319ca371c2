"""The supervisor: starts everything, decides what each signal means, and ends with a receipt."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import random
import secrets
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from lastcall.supervisor import config as configuration
from lastcall.supervisor import logs, receipt
from lastcall.supervisor.config import Config
from lastcall.supervisor.environment import Surroundings
from lastcall.supervisor.errors import ConfigError, Refused
from lastcall.supervisor.fleet.fleet import Fleet
from lastcall.supervisor.fleet.operations import Operations
from lastcall.supervisor.fleet.stalls import Watch
from lastcall.supervisor.fleet.states import Phase
from lastcall.supervisor.inworld_broker import Companion
from lastcall.supervisor.inworld_endpoint import key_of
from lastcall.supervisor.processes.reaper import Reaper
from lastcall.supervisor.program import Program, environment_of
from lastcall.supervisor.receipt import Ledger, StopRecord
from lastcall.supervisor.shutdown import Countdown, PhaseClock, shut_down
from lastcall.supervisor.signals import Inbox, Received
from lastcall.supervisor.views import control_socket, http
from lastcall.supervisor.views.commands import verbs
from lastcall.supervisor.views.sd_notify import Manager
from lastcall.supervisor.views.service_manager import Announcer
from lastcall.supervisor.views.status import View
from lastcall.worker.base.clock import now
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.process import forbid_dumps

# Two Ctrl-C this close together are one: terminals, wrappers and nervous fingers send duplicates.
AGAIN_AFTER = 0.3
AGAIN = "Ctrl-C again ends the drain, a third time kills"
FLUSH = 0.5
FENCE_FIRST = 0.005


class App:
    """One supervisor, from start to receipt."""

    def __init__(
        self,
        config: Config,
        inbox: Inbox,
        around: Surroundings,
        *,
        reread: Callable[[], Config] | None = None,
    ) -> None:
        reread = reread or (lambda: config)
        self.around = around
        console = logs.is_console(config.log_format, 2)
        self.log = logs.logger(around.stderr, console=console, colours=console and os.isatty(2))
        self.record = StopRecord()
        self.ledger = Ledger()
        self.clock = PhaseClock(self.record, self.log)
        self.countdown: Countdown | None = None
        self.receipt: dict[str, Any] = {}
        self._inbox = inbox
        self._id = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._reaper = Reaper()
        self._last_interrupt: float | None = None
        self._interrupts = 0
        self._kill_asked = False
        self._stop_reason = ""
        self._stop_at = 0.0
        self._known_pids: set[int] = set()
        quiet = around.quiet_workers
        self.companion = self._companion(config)
        self.program = Program(
            supervisor_id=self._id,
            environment=around.environment,
            reread=reread,
            reaper=self._reaper,
            coloured=console,
            settings=around.worker_settings,
            prefixes=around.prefixes_lines or (console and os.isatty(1)),
            write_output=_discard if quiet else around.stdout.write,
            write_errors=_discard if quiet else around.stderr.write,
            companion=self.companion,
            log=self.log,
        )
        self.fleet = Fleet(
            config,
            launcher=self.program.launcher(config),
            ledger=self.ledger,
            record=self.record,
            log=self.log,
            rng=random.Random(),
            # As PID 1 the orphans of a `docker exec` are ours too, and no worker's.
            sweep_unmarked=os.getpid() != 1,
            known_pids=self._known_pids,
        )
        self._known_pids.update(around.spared_pids)
        self.operations = Operations(
            self.fleet, program=lambda: self.program.read(self.fleet.config), log=self.log
        )
        self.watch = Watch(self.fleet, self.operations, log=self.log)
        self.view = View(
            fleet=self.fleet,
            clock=self.clock,
            operations=self.operations,
            watch=self.watch,
            companion=self.companion,
        )
        manager = Manager(around.environment, os.getpid())
        self.announcer = Announcer(self.view, manager, is_opaque=config.is_opaque)
        self.operations.on_reload = self.announcer.reloading

    def _companion(self, config: Config) -> Companion | None:
        if not config.inworld.enabled:
            return None
        environment = environment_of(self.around.environment, config)
        key = key_of(config.inworld, environment)
        forbid_dumps()  # the key is in our memory now
        return Companion(
            config.inworld,
            key=key,
            grace=config.grace,
            close=config.shares.within(config.grace).companion,
            supervisor_id=self._id,
            environment=environment,
            reaper=self._reaper,
            record=self.record,
            is_stopping=lambda: bool(self._stop_reason),
            known_pids=self._known_pids,
            write=_discard if self.around.quiet_workers else self.around.stderr.write,
            on_change=self._on_companion,
            log=self.log,
        )

    def _on_companion(self) -> None:
        self.fleet.changed.notify()

    # -- life -----------------------------------------------------------------------------------------

    async def run(self) -> Exit:
        """Run until a stop is over. Raises ConfigError for a wrong configuration or target."""
        async with AsyncExitStack() as stack:
            serving = await stack.enter_async_context(http.serve(self.config.http, self.view))
            table = verbs(self.fleet, self.operations, self.view, stop=self.stop, dump=self._dump)
            control = await stack.enter_async_context(control_socket.serve(self.config.control, table))
            self._reaper.start()
            stack.callback(self._reaper.close)
            what = self.config.target or " ".join(self.config.command)
            self.log.info(
                "supervisor started",
                pid=os.getpid(),
                target=what,
                workers=self.config.workers,
                grace=self.config.grace,
                http=serving,
                control=str(control),
                **receipt.versions(),
            )
            _trim()
            for line in configuration.warnings(self.around.environment):
                self.log.warning(line)
            await self._run_fleet()
        code = self._finish()
        if self.record.config_error:
            raise ConfigError(self.record.config_error)
        return code

    async def _run_fleet(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                helping = [
                    group.create_task(self._guarded(name, work), name=name)
                    for name, work in self._beside().items()
                ]
                fleet = group.create_task(self._run_workers())
                watching = group.create_task(self._watch_readiness())
                group.create_task(self._guarded("operations", self.operations.run()))
                await self._until_stop()
                if not (self.fleet.launcher.is_opaque or self._kill_asked):
                    # The workers have been told to fence, and need the processor for it: theirs first.
                    await asyncio.sleep(FENCE_FIRST)
                watching.cancel()
                countdown = Countdown(
                    self.fleet,
                    started_at=self._stop_at,
                    grace=self.config.grace,
                    shares=self.config.shares,
                    reason=self._stop_reason,
                )
                self.countdown = self.view.countdown = countdown
                self.record.reason = self._stop_reason
                self._apply_late_signals(countdown)
                try:
                    await shut_down(
                        self.fleet,
                        countdown,
                        self.clock,
                        self.log,
                        self._id,
                        inherits_orphans=self._reaper.is_subreaper,
                        companion=self.companion,
                    )
                except Exception:
                    self.fleet.shared.is_abandoned = True
                    raise
                due = max(countdown.deadlines.end_at, now() + 0.25)
                await asyncio.wait({fleet}, timeout=due - now())
                fleet.cancel()
                for task in helping:
                    task.cancel()
        except* Exception as group_error:
            # A fault of ours. The workers see our end and drain by themselves; say so, do not hang.
            self.record.fault = "; ".join(repr(error) for error in group_error.exceptions)
            self.log.error("fault in lastcall", exc_info=group_error)
        self.record.fault = self.record.fault or self.fleet.fault
        self.record.seconds = now() - self._stop_at if self._stop_at else 0.0
        self.clock.advance(Phase.STOPPED)

    def _beside(self) -> dict[str, Coroutine[Any, Any, None]]:
        """What runs beside the workers, to the end of the stop."""
        beside = {
            "signals": self._listen(),
            "beats": self.watch.run(),
            "announcer": self.announcer.run(),
        }
        if self.companion is not None:
            beside["companion"] = self.companion.run()
        return beside

    async def _guarded(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Keep a fault of one of them from cancelling the workers."""
        try:
            await work
        except Exception as error:
            self.fleet.on_fault(name, error)

    async def _run_workers(self) -> None:
        if self.companion is not None and not await self.companion.until_ready(lambda: self._stop_reason):
            self.log.warning("companion is not ready; the workers are started all the same")
        await self.fleet.run()

    async def _until_stop(self) -> None:
        await self.fleet.changed.until(
            lambda: (
                self._stop_reason or self.fleet.is_quarantined or self.fleet.config_error or self.fleet.fault
            )
        )
        if self._stop_reason:
            return
        self._stop_at = now()
        if self.fleet.fault:
            self._stop_reason = "fault in lastcall"
        elif self.fleet.config_error:
            self._stop_reason = "wrong target"
            self.record.config_error = self.fleet.config_error
        else:
            self._stop_reason = (
                f"gave up: every slot is quarantined; the last ended with: {self.fleet.last_exit}"
            )
            self.record.gave_up = True

    async def _watch_readiness(self) -> None:
        while True:
            await self.fleet.changed.until(lambda: self.fleet.accepts)
            if self.clock.phase is Phase.STARTING:
                self.clock.advance(Phase.RUNNING)
                self.log.info("ready")
            await self.fleet.changed.until(lambda: not self.fleet.accepts)
            if self._stop_reason:
                return
            self.log.warning("not ready", reason=self.view.unready_because())

    def _finish(self) -> Exit:
        document = receipt.write(self.record, self.ledger, grace=self.config.grace, pid=os.getpid())
        self.receipt = document
        document["at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if self.config.receipt:
            try:
                _write_whole(Path(self.config.receipt), json.dumps(document, indent=2) + "\n")
            except OSError as error:
                self.log.error(
                    "receipt could not be written", path=self.config.receipt, reason=error.strerror
                )
        if not self.around.quiet_receipt:
            self.log.info("receipt", receipt=document)
        for sink in (self.around.stdout, self.around.stderr):
            sink.flush(FLUSH)
        return Exit(document["exit_code"])

    @property
    def config(self) -> Config:
        return self.fleet.config

    def stop(self, reason: str) -> None:
        """Begin the stop, as SIGTERM does, for a reason of one's own."""
        self._stop(reason, now())

    # -- signals --------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            self._decide(await self._inbox.get())

    def _decide(self, received: Received) -> None:
        number = received.signal
        if number is signal.SIGTERM:
            self._stop(number.name, received.at)
        elif number is signal.SIGINT:
            self._interrupt(received.at)
        elif number is signal.SIGQUIT:
            self._stop(number.name, received.at)
            self._kill()
        elif number is signal.SIGUSR2:
            self._dump()
        elif number is signal.SIGHUP and self.around.has_terminal:
            self._stop("SIGHUP: the terminal was closed", received.at)
        else:
            self._operate(number)

    def _operate(self, number: signal.Signals) -> None:
        try:
            if number is signal.SIGHUP:
                self.operations.reload()
            elif number is signal.SIGUSR1:
                self._toggle_hold()
            elif number is signal.SIGTTIN:
                self.operations.scale(self.operations.wanted + 1)
            elif number is signal.SIGTTOU:
                self.operations.scale(self.operations.wanted - 1)
        except Refused as error:
            self.log.warning("signal ignored", signal=number.name, reason=str(error))

    def _toggle_hold(self) -> None:
        if self.fleet.launcher.is_opaque:
            raise Refused("an opaque worker can't be told to hold: it knows nothing of jobs")
        self.fleet.hold(not self.fleet.is_held)
        self.log.info("hold" if self.fleet.is_held else "released")

    def _dump(self) -> None:
        for slot in self.fleet.slots:
            slot.dump()

    def _interrupt(self, at: float) -> None:
        last, self._last_interrupt = self._last_interrupt, at
        if not self.around.has_terminal or last is None:
            self._interrupts = max(self._interrupts, 1)
            self._stop("SIGINT", at)
            if self.around.has_terminal:
                self.log.info(AGAIN if self.around.has_patience else "Ctrl-C again kills")
        elif at - last >= AGAIN_AFTER:
            self._interrupts += 1
            if self._interrupts == 2 and self.around.has_patience:
                self.log.warning("second Ctrl-C: jobs are asked to shut down now")
                self._hurry()
            else:
                self.log.warning("Ctrl-C again: killing")
                self._kill()

    def _stop(self, reason: str, at: float) -> None:
        if self._stop_reason:
            return  # repeats change nothing
        self._stop_reason, self._stop_at = reason, at
        self.fleet.fence(reason)
        self.fleet.changed.notify()
        if self.companion is not None:
            self.companion.wake()

    def _hurry(self) -> None:
        if self.countdown is not None:
            self.countdown.hurry()

    def _kill(self) -> None:
        self._kill_asked = True
        if self.countdown is not None:
            self.countdown.kill()

    def _apply_late_signals(self, countdown: Countdown) -> None:
        """A kill may have been asked for in the same turn as the stop, before there was a countdown."""
        if self._kill_asked:
            countdown.kill()


def _trim() -> None:
    """Give back what imports and the parsing of the configuration needed only once."""
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError):  # not every libc has it
        ctypes.CDLL(None).malloc_trim(0)


def _discard(_lines: bytes) -> None:
    """The demo's table stands where the workers' lines would go."""


def _write_whole(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old receipt or the new one, never half of one."""
    if path.exists() and not path.is_file():
        path.write_text(text)  # a device or a pipe is written to; replacing it would take it away
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
