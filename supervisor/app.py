"""The supervisor: wires everything together, lives until a stop is over, and ends with a receipt."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from lastcall.supervisor import config as configuration
from lastcall.supervisor import logs, receipt, receipt_file
from lastcall.supervisor.config import Config, calls
from lastcall.supervisor.environment import Surroundings
from lastcall.supervisor.errors import ConfigError
from lastcall.supervisor.fleet.fleet import Fleet
from lastcall.supervisor.fleet.footprints import Footprints
from lastcall.supervisor.fleet.operations import Operations
from lastcall.supervisor.fleet.stalls import Watch
from lastcall.supervisor.fleet.states import Phase
from lastcall.supervisor.inworld_broker import Companion
from lastcall.supervisor.inworld_endpoint import key_of
from lastcall.supervisor.outputs import Outputs
from lastcall.supervisor.processes.child import check_open_files
from lastcall.supervisor.processes.reaper import Reaper
from lastcall.supervisor.program import Program, environment_of
from lastcall.supervisor.receipt import Ledger, StopRecord, textfile
from lastcall.supervisor.sentences import SENTENCES
from lastcall.supervisor.shutdown import PhaseClock, Shutdown, Stop
from lastcall.supervisor.signal_actions import SignalActions
from lastcall.supervisor.signals import Inbox
from lastcall.supervisor.views import control_socket, http
from lastcall.supervisor.views.commands import Commands
from lastcall.supervisor.views.sd_notify import NotifySocket
from lastcall.supervisor.views.service_manager import Announcer
from lastcall.supervisor.views.status import Status
from lastcall.worker.base import variables
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.process import forbid_dumps

# Seconds that the end waits for a slow reader of standard output, and of standard error. Ours: a moment.
FLUSH_WITHIN = 0.5
# Seconds that the tasks of the slots have to end once everything has been swept.
SLOTS_END_WITHIN = 0.25
# Seconds between the fence and the rest of a stop, which takes processor time from workers that are about
# to fence. Measured as in `scripts/bench`, 2 workers on 2 cores, in ten turns with and without this pause.
# From SIGTERM to the last FULL: p50 2.05 ms with the pause, 2.56 ms without. Each turn without took longer.
FENCE_FIRST = 0.005
# Seconds until the garbage of the start is collected although no worker runs. Ours: an image takes a few.
TRIM_WITHIN = 5.0


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
        self.log = logs.logger(
            around.stderr, console=console, colours=console and os.isatty(2), texts=SENTENCES
        )
        if console:
            around.stdout.breaks_lines = around.stderr.breaks_lines = True
        self.record = StopRecord()
        self.ledger = Ledger()
        self.receipt: dict[str, Any] = {}
        self._id = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._reaper = Reaper()
        self._known_pids = set(around.spared_pids)
        changed = Condition()
        self._outputs = Outputs(stdout=around.stdout, stderr=around.stderr, log=self.log)
        quiet = around.quiet_workers
        environment = environment_of(around.environment, config)
        key = key_of(config.inworld, environment) if config.inworld.enabled else ""
        self.companion = self._companion(config, environment, key, changed)
        self.program = Program(
            supervisor_id=self._id,
            environment=around.environment,
            reread=reread,
            reaper=self._reaper,
            coloured=console,
            settings=around.worker_settings,
            prefixes=around.prefixes_lines or (console and os.isatty(1)),
            write_output=_discard if quiet else self._outputs.write_stdout,
            write_errors=_discard if quiet else self._outputs.write_stderr,
            companion=self.companion,
            known_pids=self._known_pids,
            is_stopping=lambda: self.fleet.is_stopping,
            log=self.log,
        )
        self.fleet = Fleet(
            config,
            changed=changed,
            launcher=self.program.launcher(config, environment, key),
            ledger=self.ledger,
            record=self.record,
            log=self.log,
            rng=random.Random(),
            # A supervisor that is PID 1 also inherits the orphans of a `docker exec`. No worker started
            # those, so a process without a mark is then not swept.
            sweep_unmarked=os.getpid() != 1,
            known_pids=self._known_pids,
        )
        self.clock = PhaseClock(self.record, self.log)
        self.shutdown = Shutdown(
            self.fleet, self.companion, clock=self.clock, record=self.record, log=self.log
        )
        self.announcer = Announcer(
            self.fleet,
            self.shutdown,
            NotifySocket(around.environment, os.getpid()),
            is_opaque=config.is_opaque,
        )
        self.operations = Operations(
            self.fleet,
            reread=lambda: self.program.read(self.fleet.config),
            on_reload=self.announcer.reloading,
            log=self.log,
        )
        self.watch = Watch(self.fleet, self.operations, log=self.log)
        self.footprints = Footprints(self.fleet)
        self.status = Status(
            fleet=self.fleet,
            shutdown=self.shutdown,
            operations=self.operations,
            watch=self.watch,
            footprints=self.footprints,
            companion=self.companion,
            outputs=self._outputs,
        )
        self.commands = Commands(
            self.fleet,
            operations=self.operations,
            status=self.status,
            shutdown=self.shutdown,
            log=self.log,
        )
        self.signals = SignalActions(
            inbox,
            shutdown=self.shutdown,
            commands=self.commands,
            operations=self.operations,
            has_terminal=around.has_terminal,
            has_patience=around.has_patience,
            log=self.log,
        )

    def _companion(
        self, config: Config, environment: Mapping[str, str], key: str, changed: Condition
    ) -> Companion | None:
        if not config.inworld.enabled:
            return None
        forbid_dumps()  # a core dump of the supervisor would contain the key from now on
        return Companion(
            config.inworld,
            key=key,
            keys_in_use=self._inworld_keys,
            grace=config.grace,
            close=config.shares.within(config.grace).companion,
            supervisor_id=self._id,
            environment=environment,
            reaper=self._reaper,
            record=self.record,
            is_stopping=lambda: self.fleet.is_stopping,
            known_pids=self._known_pids,
            write=_discard if self.around.quiet_workers else self._outputs.write_stderr,
            on_change=changed.notify,
            log=self.log,
        )

    def _inworld_keys(self) -> Iterator[str]:
        """Yield the digests of the Inworld keys that the workers of this moment have, and the next ones."""
        for launcher in (self.fleet.launcher, *(each.launcher for each in self.fleet.generations)):
            yield from launcher.environment.get(variables.INWORLD_KEYS, "").split()

    @property
    def config(self) -> Config:
        return self.fleet.config

    def stop(self, reason: str) -> None:
        """Begin the stop, as SIGTERM does, for another reason."""
        self.shutdown.begin(reason)

    # -- life -----------------------------------------------------------------------------------------

    async def run(self) -> Exit:
        """Run until a stop is over. Raises ConfigError for a wrong configuration or target."""
        check_open_files(self.config.workers)
        async with AsyncExitStack() as stack:
            serving = await stack.enter_async_context(http.serve(self.config.http, self.status, self.log))
            control = await stack.enter_async_context(
                control_socket.serve(self.config.control, self.commands.table())
            )
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
            for line in (*configuration.warnings(self.around.environment), self._too_short()):
                if line:
                    self.log.warning(line)
            await self._run_fleet()
        code = self._finish()
        if self.record.config_error:
            raise ConfigError(self.record.config_error)
        return code

    def _too_short(self) -> str:
        """Say which callbacks grace is too short for.

        An opaque program has none that lastcall knows of, and no real call waits for those of dev and demo.
        """
        has_callers = self.around.has_patience and not self.around.worker_settings.local_url
        if self.config.is_opaque or not has_callers:
            return ""
        return calls.warning(self.config.grace, self.config.shares)

    async def _run_fleet(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                beside = [
                    group.create_task(self._guarded(name, work), name=name)
                    for name, work in self._beside().items()
                ]
                workers = group.create_task(self._run_workers())
                watching = group.create_task(self._guarded("readiness", self._watch_readiness()))
                group.create_task(self._guarded("operations", self.operations.run()))
                stop = await self._until_stop()
                watching.cancel()
                await self._see_workers_out(stop, workers)
                for task in beside:
                    task.cancel()
        except* Exception as group_error:
            # A fault of lastcall. The workers drain by themselves when they see the end of the supervisor.
            self.record.fault = "; ".join(repr(error) for error in group_error.exceptions)
            self.log.error("fault in lastcall", exc_info=group_error)
        self.record.fault = self.record.fault or self.fleet.fault
        if self.shutdown.stop is not None:
            self.record.seconds = now() - self.shutdown.stop.started_at
        self.clock.advance(Phase.STOPPED)

    def _beside(self) -> dict[str, Coroutine[Any, Any, None]]:
        """Return the work that goes on beside the workers, to the end of the stop."""
        beside = {
            "signals": self.signals.run(),
            "beats": self.watch.run(),
            "announcer": self.announcer.run(),
            "memory": self._trim(),
            "footprints": self.footprints.run(),
        }
        if self.companion is not None:
            beside["companion"] = self.companion.run()
        return beside

    async def _trim(self) -> None:
        """Give back what the start needed only once, when the first worker no longer waits for that."""
        due = now() + TRIM_WITHIN
        await self.fleet.changed.until(lambda: any(each.pid for each in self.fleet.generations), lambda: due)
        gc.collect()
        gc.freeze()
        gc.enable()  # `__main__` has switched it off
        with contextlib.suppress(OSError, AttributeError):  # not every libc has it
            ctypes.CDLL(None).malloc_trim(0)

    async def _guarded(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Keep a fault in the work beside the workers from cancelling the workers."""
        try:
            await work
        except Exception as error:
            self.fleet.on_fault(name, error)

    async def _run_workers(self) -> None:
        companion = self.companion
        if companion is not None and not await companion.until_ready(lambda: self.shutdown.stop):
            self.log.warning("companion is not ready; the workers are started all the same")
        await self.fleet.run()

    async def _until_stop(self) -> Stop:
        """Return the stop that somebody has begun; begin one when the supervisor has to give up."""
        fleet, shutdown = self.fleet, self.shutdown
        await fleet.changed.until(
            lambda: shutdown.stop or fleet.is_quarantined or fleet.config_error or fleet.fault
        )
        if shutdown.stop is not None:
            return shutdown.stop
        if fleet.fault:
            return shutdown.begin("fault in lastcall")
        if fleet.config_error:
            self.record.config_error = fleet.config_error
            return shutdown.begin("wrong target")
        self.record.gave_up = True
        return shutdown.begin(f"gave up: every slot is quarantined; the last ended with: {fleet.last_exit}")

    async def _see_workers_out(self, stop: Stop, workers: asyncio.Task[None]) -> None:
        if not self.fleet.launcher.is_opaque and stop.deadlines.terminate_at > now():
            await asyncio.sleep(FENCE_FIRST)
        self.fleet.end_images()
        try:
            await self.shutdown.run(stop, self._id, inherits_orphans=self._reaper.is_subreaper)
        except Exception:
            self.fleet.abandon()
            raise
        due = max(stop.deadlines.end_at, now() + SLOTS_END_WITHIN)
        await asyncio.wait({workers}, timeout=due - now())
        workers.cancel()
        for generation in self.fleet.generations:
            generation.write_off()

    async def _watch_readiness(self) -> None:
        while True:
            await self.fleet.changed.until(lambda: self.fleet.works)
            if self.clock.phase is Phase.STARTING:
                self.clock.advance(Phase.RUNNING)
                self.log.info("ready")
            await self.fleet.changed.until(lambda: not self.fleet.works)
            if self.shutdown.stop is not None:
                return
            self.log.warning("not ready", reason=self.status.unready_because())

    def _finish(self) -> Exit:
        document = receipt.write(self.record, self.ledger, grace=self.config.grace, pid=os.getpid())
        self.receipt = document
        document["at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if self.config.receipt:
            self._write_receipt(Path(self.config.receipt), document)
        self._outputs.tell_dropped()
        if not self.around.quiet_receipt:
            self.log.info("receipt", receipt=document)
        self._outputs.flush(FLUSH_WITHIN)
        return Exit(document["exit_code"])

    def _write_receipt(self, path: Path, document: dict[str, Any]) -> None:
        try:
            receipt_file.write_whole(path, json.dumps(document, indent=2) + "\n")
        except OSError as error:
            self.log.error("receipt could not be written", path=str(path), reason=error.strerror)
            return
        try:
            receipt_file.write_figures(path, document)
        except OSError as error:
            figures = f"{path}{textfile.SUFFIX}"
            self.log.error("receipt could not be written", path=figures, reason=error.strerror)
        except Exception:
            # A fault of lastcall after the stop. The exit code speaks of the stop, and the log of the fault.
            self.log.error("fault in lastcall", exc_info=True)


def _discard(_lines: bytes) -> None:
    """The demo's table stands where the workers' lines would go."""
