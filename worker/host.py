"""The life of a worker: run until a reason to stop, then fence, drain, end what is left, close.

reason to stop                    what follows
------------------------------    ---------------------------------------------------------------
SIGTERM, SIGINT, fence message    the stop, within the budget
control socket at end of file     the same, with the budget known from the start
connection given up for good      the same; the supervisor takes the exit for a failure
the first job process failed      the same, and the reason is reported
the server's own run() raised     the same, and the error is reported
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import sys
from typing import Any, assert_never

from lastcall.worker import exposition, imported
from lastcall.worker.base.budget import close_by, hand_over_until, kept_for_reports
from lastcall.worker.base.calls_over import CallsOver
from lastcall.worker.base.channel import Control
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.process import rss_bytes
from lastcall.worker.base.resources import Resources
from lastcall.worker.base.settings import WorkerSettings
from lastcall.worker.base.stopping import Stopping, stop_on_signals
from lastcall.worker.base.wire import (
    FOR_WORKER,
    AskMetrics,
    Beat,
    Drain,
    Drained,
    Fence,
    Fenced,
    HandOver,
    HandoverOff,
    Hold,
    Imported,
    JobEnded,
    MetricsText,
    Ready,
    Resource,
    Served,
    ShieldOpen,
    StopCause,
    Terminate,
    WorkerHears,
    WorkerSays,
    shortened,
)
from lastcall.worker.call_channels import Calls
from lastcall.worker.engine import Engine
from lastcall.worker.inworld.plugin.attached import plugin_connections
from lastcall.worker.orphan_output import OrphanOutput, peer_pid

log = logging.getLogger("lastcall.worker")

# The share of what is kept for reports in which the server is told, also when a killed job has not died.
# Ours: half a second, for round trips.
TELLING = 0.25
# Seconds that a worker rests after its fence. The other workers of the machine fence at the same moment, and
# a worker that goes on takes processor time from them, because it ends and because it wakes the supervisor.
# Measured as `scripts/bench` does, in turns with and without the rest: two workers on two cores that other
# programs kept busy, from SIGTERM until the server saw both FULL. The median was 1.6 ms and the worst 2.2 ms
# with the rest, 12.6 ms and 15.9 ms without.
REST_AFTER_FENCE = 0.01


class Host:
    """Owns the engine, the control connection and the stop of one worker process."""

    def __init__(self, settings: WorkerSettings, stopping: Stopping, changed: Condition) -> None:
        self.settings = settings
        self.stopping = stopping
        self.changed = changed
        self.resources = Resources()
        self.calls_over = CallsOver()
        self.calls = Calls(close_needed=settings.shares.close_needed)
        self._killed = False
        self._fenced = False
        self._cause: StopCause = "stop"
        self._deadlines: Drain | None = None
        self._lag = 0.0
        self._asked_hold = False
        self._metrics_error = ""
        fd = settings.control_fd
        sock = None if fd is None else socket.socket(fileno=fd)
        self._output = OrphanOutput(settings.output_fds, 0 if sock is None else peer_pid(sock))
        self.control: Control[WorkerSays, WorkerHears] = Control(
            sock, FOR_WORKER, self._on_message, self._on_lost
        )
        self.engine: Engine | None = None

    def adopt(self, server: Any) -> None:
        """Take the loaded AgentServer; nothing of it runs yet."""
        self.engine = Engine(
            server,
            changed=self.changed,
            must_refuse=lambda: self.stopping.is_set or self._asked_hold,
            report=self._report,
            calls_over=self.calls_over,
            is_local=bool(self.settings.local_url),
            max_running=self.settings.max_running,
            job_memory_limit=self.settings.job_memory_limit,
            finish=self.settings.finish,
            handover=self.settings.handover,
            say=self.calls.say,
        )
        self.calls.hear = self.engine.handovers.hear
        self.resources.join("livekit", self.engine.close)

    async def run(self) -> int:
        """Run until the end of the stop and return the exit code."""
        with stop_on_signals(asyncio.get_running_loop(), self.stopping):
            return await self._run()

    async def _run(self) -> int:
        self.calls.open(asyncio.get_running_loop())
        self._output.watch()
        try:
            return await self._live()
        finally:
            self.calls.close()

    async def _live(self) -> int:
        engine = self.engine
        assert engine is not None
        await self.control.connect()
        for _ in range(4):  # a signal that came while the target was loaded is still on its way
            await asyncio.sleep(0)
        if self.settings.tells_imports:
            for files in imported.portions(imported.imported_files(list(sys.modules.values()))):
                self.control.say(Imported(files=files))
        async with asyncio.TaskGroup() as group:
            beside = [
                group.create_task(self._beats()),
                group.create_task(engine.see_processes_out()),
                group.create_task(engine.memory.run()),
                group.create_task(engine.terminations.run()),
            ]
            running: list[asyncio.Task[None]] = []
            if self.stopping.is_set:
                engine.ended = True
            else:
                running.append(group.create_task(engine.run()))
                telling = [
                    group.create_task(engine.keep_told()),
                    group.create_task(self._tell_of_changes(engine)),
                ]
                # Before the beats and all others: each that looks first makes the fence later.
                await self.changed.until(lambda: self.stopping.is_set or engine.is_lost, is_first=True)
                for task in telling:
                    task.cancel()
            code = await self._stop(engine)
            # A server whose close was given up would run on, and the worker with it.
            for task in (*beside, *running):
                task.cancel()
        return code

    # -- the stop -------------------------------------------------------------------------------------

    async def _stop(self, engine: Engine) -> int:
        failed = not self.stopping.is_set
        if failed:
            reason = "lost" if engine.error is None else shortened(f"failed: {engine.error}")
            self.stopping.begin(reason)
            log.error("worker is going down", extra={"reason": reason})
        began = now()
        fenced_at = await self._fence(engine)
        await asyncio.sleep(0.0 if self._killed else REST_AFTER_FENCE)
        # After the fence, which planning would delay. A supervisor has sent deadlines by now.
        if self._deadlines is None:
            planned = self.settings.plan(began)
            self._deadlines = Drain(drain_at=planned.drain_at, close_at=planned.close_at, cause=self._cause)
        # Said also when the server could not be told: the gate has refused every offer since the stop began.
        self.control.say(Fenced(reason=self.stopping.reason, at=fenced_at))
        self._fenced = True
        self._tell_calls()
        if len(engine.jobs):  # a worker that is killed without any has no time to end a task
            engine.hand_over_before(self._drain_at, self._hand_over_until)
        await self.changed.until(lambda: not len(engine.jobs), self._drain_at)
        self.control.say(Drained())
        began = now()
        deadlines = self._deadlines
        close_at = close_by(began, drain_at=deadlines.drain_at, close_at=deadlines.close_at)
        kept = kept_for_reports(close_at - began)
        kill_at = close_at - kept
        if len(engine.jobs):
            log.warning("asking jobs to shut down", extra={"jobs": len(engine.jobs)})
            await engine.end_jobs(self._or_now(kill_at), close_at - TELLING * kept, self._job_due_at)
        if plugin_connections.is_needed:
            self.resources.join("inworld", plugin_connections.aclose)
        census = await self.resources.aclose(close_at)
        for resource in census:
            self.control.say(Resource(name=resource.name, fate=resource.fate, counts=resource.counts))
        await asyncio.sleep(0)
        if failed:
            return Exit.FAILED
        clean = not engine.jobs.cut and all(r.fate == "closed" for r in census)
        return Exit.CLEAN if clean else Exit.FORCED

    async def _fence(self, engine: Engine) -> float:
        """Tell the server, and return when that was done."""
        try:
            async with asyncio.timeout(1.0):
                await engine.fence()
        except TimeoutError:
            log.warning("the server could not be told that the worker takes no more jobs")
        return now()

    def _tell_calls(self) -> None:
        """Tell the calls until when they may go on, once the fence can't be delayed by it."""
        if self._fenced and self._deadlines is not None:
            self.calls.tell(self._deadlines)

    def _drain_at(self) -> float | None:
        return None if self._deadlines is None else self._deadlines.drain_at

    def _hand_over_until(self) -> float | None:
        told = self._deadlines
        return None if told is None else hand_over_until(told.drain_at, told.close_at)

    def _job_due_at(self, job_id: str) -> float:
        """Return until when a job may go on: it has asked for more time, or is to be handed over."""
        handed_over_at = 0.0 if self.engine is None else self.engine.handovers.due_at(job_id)
        return max(self.calls.due_at(job_id), handed_over_at)

    def _or_now(self, at: float) -> float:
        return now() if self._killed else at

    # -- what the supervisor says ---------------------------------------------------------------------

    def _on_message(self, message: WorkerHears) -> None:
        match message:
            case Fence(reason=reason, cause=cause):
                self._cause = cause
                self.stopping.begin(reason)
            case Drain():
                if not self._killed:
                    self._deadlines = message
                    self._tell_calls()
            case Terminate():
                self._killed = True
                at = now()
                self._deadlines = Drain(drain_at=at, close_at=at, cause=self._cause)
                self._tell_calls()
                self.stopping.begin("terminate")
            case Hold(on=on):
                self._asked_hold = on
                if self.engine is not None:
                    self.engine.hold(on)
            case Served(rooms=rooms):
                if self.engine is not None:
                    self.engine.second_jobs.beside(rooms)
            case HandOver(id=id, reason=reason):
                if self.engine is not None:
                    self.engine.hand_over(id, reason)
            case HandoverOff(agent_name=agent_name, reason=reason):
                if self.engine is not None:
                    self.engine.handovers.off.setdefault(agent_name, reason)
            case AskMetrics(id=id):
                self.control.say(MetricsText(id=id, text=self._metrics()))
            case _:
                assert_never(message)
        self.changed.notify()

    def _metrics(self) -> str:
        """Return livekit-agents' metrics; empty where the registry can't be read.

        The collectors of the agent stand in the same registry, and may raise anything.
        """
        try:
            return exposition.text()
        except Exception as error:
            if repr(error) != self._metrics_error:
                self._metrics_error = repr(error)
                log.exception("metrics of this worker can't be read")
            return ""

    def _on_lost(self) -> None:
        self.stopping.begin("supervisor lost")

    async def _tell_of_changes(self, engine: Engine) -> None:
        """Beat out of turn when the supervisor is waiting for what has just changed."""
        while True:
            told = (engine.accepts, engine.is_warm)
            await self.changed.until(lambda told=told: (engine.accepts, engine.is_warm) != told)  # type: ignore[misc]
            self._beat()

    # -- what the supervisor hears --------------------------------------------------------------------

    def _report(self, message: WorkerSays) -> None:
        if isinstance(message, ShieldOpen):
            log.error("shield does not hold", extra={"pid": message.pid, "open_to": message.open_to})
        self.control.say(message)
        if isinstance(message, Ready):
            self._beat()
        elif isinstance(message, JobEnded):
            self.calls.forget(message.id)

    async def _beats(self) -> None:
        beat = self.settings.beat
        while True:
            due = now() + beat
            await asyncio.sleep(beat)
            self._lag = max(0.0, now() - due)
            self._beat()

    def _beat(self) -> None:
        engine = self.engine
        assert engine is not None
        engine.handovers.tell_keeps()
        load = engine.load
        self.control.say(
            Beat(
                lag_ms=round(self._lag * 1000, 2),
                load=round(load, 4) if math.isfinite(load) else 0.0,  # a load_fnc may return anything
                rss_bytes=rss_bytes(),
                registered=engine.is_registered,
                accepting=engine.accepts and not self.stopping.is_set,
                warm=engine.is_warm,
                full=(engine.full_because or "") if engine.is_registered else "",
            )
        )
        if engine.is_lost:
            self.changed.notify()
