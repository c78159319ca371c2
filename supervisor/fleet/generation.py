"""One generation of a slot: one program, from its spawn until it has ended and is swept.

Every change of state goes through `change`, which knows the table and writes the one log line.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterable
from typing import Any

from lastcall.supervisor.errors import SpawnError, TransitionError
from lastcall.supervisor.fleet.aftermath import Sweep, ended_well, post_mortem
from lastcall.supervisor.fleet.shared import Shared
from lastcall.supervisor.fleet.states import ALIVE, SLOT_LOG_EVENT, SLOT_TABLE, SlotEvent, SlotState
from lastcall.supervisor.fleet.stop_steps import StopState
from lastcall.supervisor.fleet.worker_view import WorkerView
from lastcall.supervisor.processes import cgroup, descendants
from lastcall.supervisor.processes.launch import Launched, Launcher
from lastcall.supervisor.processes.reaper import ExitStatus
from lastcall.supervisor.processes.worker_channel import Channel
from lastcall.supervisor.receipt import JobEntry
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.wire import (
    MAX_LINE_BYTES,
    NUL,
    OF_WORKER,
    Beat,
    Fault,
    Fenced,
    HandoverOff,
    Hold,
    ProcessFailed,
    Ready,
    Served,
    Terminate,
    WorkerHears,
    WorkerSays,
)

E, S = SlotEvent, SlotState

# Seconds to wait for the last messages of an exited worker, twice: a supervisor that was itself stopped
# during the first wait reads them in the second. Ours: the messages are in the socket already.
LAST_WORDS_WITHIN = 0.5
# Bytes of JSON for the rooms of other workers that a worker is told of. Ours: some thousand rooms.
MAX_SERVED_BYTES = MAX_LINE_BYTES // 2
# Seconds from the end of file on the control channel until a worker that still lives counts as cut off. Ours:
# the kernel closes the files of a process some milliseconds before the supervisor learns of the end.
CUT_OFF_AFTER = 0.5
# Seconds that a worker which did not register in time has to leave by itself. Ours: as `[stop] terminate`.
TAKEN_DOWN_IN = 5.0


class Generation:
    """One program of one slot. `ended` is true once all that is left of it, if anything, is dying."""

    def __init__(
        self,
        slot: int,
        number: int,
        *,
        launcher: Launcher,
        shared: Shared,
        changed: Condition,
        state: SlotState = S.STOPPED,
    ) -> None:
        self.slot = slot
        self.number = number
        self.state = state
        self.since = now()
        self.changed = changed
        self.shared = shared
        self.log = shared.log.bind(slot=slot, generation=number)
        self.ended = False
        self.last_exit = ""
        self.config_error = ""
        self.ready_at: float | None = None
        # By when it has to be ready, while it starts.
        self.ready_by: float | None = None
        self.is_silent = False
        # The worker lives and its control channel is closed: it drains by itself, and reports nothing more.
        self.is_cut_off = False
        # Its process is being started, which takes as long as an image does.
        self.is_launching = False
        # A candidate takes no job before it has proved that it could do one.
        self.is_candidate = False
        self.reports = WorkerView(slot, number, ledger=shared.ledger, record=shared.record, log=self.log)
        self.stopping = StopState()
        # The private memory of the worker itself in bytes, at the last look; None before it.
        self.private_bytes: int | None = None
        self.launcher = launcher
        self._launched: Launched | None = None
        self._sweep: Sweep | None = None
        self._channel: Channel[WorkerHears, WorkerSays] | None = None
        self._channel_lost = False
        self._cut: frozenset[str] = frozenset()
        self._fenced_since: float | None = None
        self._oom_kills: int | None = None
        # The agent names of which the worker knows that their calls are not handed over.
        self._told_off: set[str] = set()

    # -- what others see ------------------------------------------------------------------------------

    @property
    def is_opaque(self) -> bool:
        return self.launcher.is_opaque

    @property
    def is_alive(self) -> bool:
        return self.state in ALIVE

    @property
    def pid(self) -> int | None:
        launched = self._launched
        return launched.child.pid if launched is not None and self.is_alive else None

    @property
    def has_exited(self) -> bool:
        return self._launched is None or self._launched.child.status is not None

    @property
    def is_connected(self) -> bool:
        """Whether the worker can be told something; an opaque program never can."""
        return self._channel is not None and not self._channel_lost

    @property
    def was_ready(self) -> bool:
        return self.ready_at is not None

    @property
    def works(self) -> bool:
        """Whether the worker is registered and a process of it has been warm; an opaque program is up.

        The one definition: of the probe, of the service manager's READY, of the first start, of a candidate.
        """
        return self.state is S.READY

    @property
    def accepts(self) -> bool:
        """Whether the worker takes jobs at this moment; an opaque one has only its being up to say so."""
        beat = self.reports.beat
        return self.works and (self.is_opaque or (beat is not None and beat.accepting))

    @property
    def full_because(self) -> str:
        """Why the worker takes no job although it works; empty when it does, or does not say."""
        beat = self.reports.beat
        return beat.full if self.works and beat is not None and not beat.accepting else ""

    @property
    def is_usable(self) -> bool:
        """Whether it could take over: it works, and an opaque program has done so for a while."""
        return self.works and (not self.is_opaque or now() >= self.usable_at)

    @property
    def missing(self) -> str:
        """The reason why a worker was not ready in time."""
        beat = self.reports.beat
        text = f"not registered within {self.shared.config.start.timeout:g} s"
        if self.reports.is_loaded and not (beat is not None and beat.warm):
            text += f": no process of it was ready for a job; {self.reports.process_failure or 'see its log'}"
        return text

    @property
    def failed_cold(self) -> bool:
        """Whether the start failed with the first job process, however long that took."""
        return not self.was_ready and self.reports.process_failures > 0

    @property
    def usable_at(self) -> float:
        """When an opaque program counts as one that works: it says nothing itself."""
        assert self.ready_at is not None
        return self.ready_at + self.shared.config.reload.settle

    @property
    def is_leaving(self) -> bool:
        """Whether it goes down unasked: it was signalled itself, is cut off, or lost its server for good."""
        fenced = (self.reports.fenced_at is not None or self.is_cut_off) and self.was_ready
        return fenced and not self.stopping.is_asked and not self.ended

    @property
    def leaves_because(self) -> str:
        """Why it goes down unasked."""
        return self.reports.fence_reason or ("control channel lost" if self.is_cut_off else "")

    @property
    def is_fencing(self) -> bool:
        """Whether the stop waits for the worker to say that it accepts nothing more."""
        stopping = self.stopping
        waits = stopping.is_asked and not stopping.progress.is_fence_settled
        is_told = self.is_connected or stopping.progress.fence_said_at is not None
        return waits and is_told and self.state is S.DRAINING and self.was_ready

    @property
    def end_kind(self) -> str:
        """How it ended, as a word to count by."""
        status = None if self._launched is None else self._launched.child.status
        if status is None:
            return "not started"
        if not self.was_ready:
            return "never ready"
        return "exited" if status.signal is None else "killed"

    @property
    def jobs(self) -> list[JobEntry]:
        return self.shared.ledger.of(self.slot, self.number)

    @property
    def jobs_to_cut(self) -> list[JobEntry]:
        """The jobs that are cut unless they end before `drain_at`; none without a stop of this generation."""
        if not self.stopping.is_asked:
            return []
        return [job for job in self.jobs if not (job.is_over or job.is_cut or job.successor)]

    def has_living_jobs(self) -> bool:
        """Look at the processes of the jobs, for a worker that can't tell any more."""
        return any(is_living(job) for job in self.jobs)

    # -- the one place where the state changes --------------------------------------------------------

    def change(self, event: SlotEvent, **why: Any) -> None:
        """Apply an event. Raises TransitionError when the table does not list it for this state."""
        try:
            after = SLOT_TABLE[self.state, event]
        except KeyError:
            raise TransitionError(f"slot {self.slot}: {event.name} in state {self.state.name}") from None
        before, self.state, self.since = self.state, after, now()
        failed = after in (S.FAILED, S.QUARANTINED, S.STALLED)
        write = self.log.warning if failed else self.log.info
        write(SLOT_LOG_EVENT[after], was=before.value, **why)
        if event is E.FENCE:
            self._fenced_since = self.since
        elif self._fenced_since is not None:
            # The moment in which jobs are given up, or the worker is, is no end of a drain.
            if after in (S.CLOSING, S.STOPPED) and not self.has_living_jobs():
                self.shared.drain_seconds.observe(self.since - self._fenced_since)
            self._fenced_since = None
        self.changed.notify()
        self.shared.on_change()

    # -- life -----------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Start the program, stay until its end, and clean up after it."""
        launched = None
        try:
            if not self.stopping.is_asked:  # between the decision to start it and now
                self.ready_by = now() + self.launcher.starts_within + self.shared.config.start.timeout
                self.shared.on_change()  # the service manager waits longer while an image is made
                launched = await self.launcher.start(
                    self.slot,
                    self.number,
                    self._on_exit,
                    changed=self.changed,
                    is_wanted=lambda: not (self.stopping.is_asked or self.shared.is_stopping),
                    is_candidate=self.is_candidate,
                )
        except SpawnError as error:
            self.last_exit = str(error)
            self.config_error = "" if error.may_pass else str(error)
            self.change(E.FAIL, reason=str(error))
        finally:
            self.is_launching = False
        if launched is None:
            self.ready_by = None
            self._end()
            return
        self._launched = launched
        self._oom_kills = cgroup.oom_kills()
        self.shared.known_pids.add(launched.child.pid)
        self.change(E.SPAWN, pid=launched.child.pid)
        try:
            if launched.control is None:
                self.ready_at = now()
                self.change(E.REGISTER)
            else:
                self._channel = await Channel.open(
                    launched.control, OF_WORKER, self._on_message, self._on_lost
                )
                if self.shared.is_held or self.is_candidate:
                    self.say(Hold(on=True))
                self.changed.notify()  # a stop that has begun meanwhile can tell the worker now
            await self._start_in_time()
            await self.changed.until(lambda: self.has_exited or self._channel_lost)
            lost_at = now()
            if not await self.changed.until(lambda: self.has_exited, lambda: lost_at + CUT_OFF_AFTER):
                await self._see_cut_off(lost_at)
        except asyncio.CancelledError:
            if not self.shared.is_abandoned:
                self._kill_processes()  # the end of the whole stop; nothing may stay
                launched.clear()
            raise
        await self._clean_up(launched)

    async def see_out(self) -> None:
        """After a fault in `live`: leave the worker to its stop, and clean up when it has ended."""
        if self._launched is not None and self.is_alive:
            await self.changed.until(lambda: self.has_exited)
            await self._clean_up(self._launched)

    async def _start_in_time(self) -> None:
        due = self.ready_by = now() + self.shared.config.start.timeout
        started = await self.changed.until(
            lambda: self.has_exited or self.state is not S.STARTING or self.stopping.is_asked, lambda: due
        )
        self.ready_by = None
        if started:
            return
        self.last_exit = self.missing
        self.change(E.TERMINATE, reason=self.last_exit)
        self.say(Terminate())
        grace = now() + TAKEN_DOWN_IN
        if not await self.changed.until(lambda: self.has_exited, lambda: grace):
            self.kill()

    async def _see_cut_off(self, lost_at: float) -> None:
        """Have a worker that lives without a control channel drain by itself, and wait for its end.

        SIGTERM begins its stop, unless it has seen the end of file and begun before. A worker whose code has
        closed the descriptor sees none: the kernel gives the number to the next file, or socket.
        """
        self.is_cut_off, self.is_silent = True, False
        self.send(signal.SIGTERM)
        self.log.warning("worker is cut off: it drains by itself")
        if self.state in (S.STARTING, S.READY, S.STALLED):
            self.change(E.FENCE, reason=self.leaves_because)
        self.changed.notify()
        drain_at = self.launcher.settings.plan(lost_at).drain_at
        if not await self.changed.until(lambda: self.has_exited, lambda: drain_at):
            self.note_cut()
            await self.changed.until(lambda: self.has_exited)

    async def _clean_up(self, launched: Launched) -> None:
        """The process has ended: nothing of it may stay."""
        child = launched.child
        if self._channel is not None:  # its last messages may be unread; end of file comes behind them
            for _ in range(2):
                due = now() + LAST_WORDS_WITHIN
                await self.changed.until(lambda: self._channel_lost, lambda due=due: due)  # type: ignore[misc]
        shared = self.shared
        # Once the generation has ended, the next one may have started.
        self._sweep = Sweep(
            launched.mark,
            shared.known_pids,
            shared.swept,
            unmarked=lambda: not self.ended and shared.may_sweep_unmarked(),
        )
        await self._sweep.reach_all()
        if self.stopping.is_asked:
            await self._sweep.finish()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        launched.close()
        self.shared.known_pids.discard(child.pid)
        self._record_end(launched, child.status, self._sweep.programs)
        self._end()

    async def finish_sweep(self) -> None:
        """Wait until nothing is left of a worker that has ended unasked, beside the next one."""
        if self._sweep is not None:
            before = self._sweep.programs
            try:
                await self._sweep.finish()
            finally:  # the end of the whole stop may cancel this
                self.shared.record.swept += self._sweep.programs - before

    def _end(self) -> None:
        self.ended = True
        self.changed.notify()
        self.shared.on_change()

    def _record_end(self, launched: Launched, status: ExitStatus | None, swept: int) -> None:
        shared = self.shared
        # A worker that is cut off can't report the end of a job. Its exit code says that it has seen all of
        # them out, and whether it had to cut one.
        code = status.code if self.is_cut_off and status is not None else None
        lost = shared.ledger.lose(
            self.slot,
            self.number,
            now(),
            cut=() if code == Exit.CLEAN else self._cut,
            is_vouched=code in (Exit.CLEAN, Exit.FORCED),
        )
        shared.record.swept += swept
        self.last_exit = self.reports.fault or self.last_exit or str(status)
        if self.reports.is_config_error:
            self.config_error = self.reports.fault
        is_well = self.state is S.KILLING or ended_well(status, is_opaque=self.is_opaque)
        as_asked = self.stopping.is_asked and is_well
        event = E.EXIT if as_asked else E.FAIL
        if (self.state, event) not in SLOT_TABLE:
            # The program ended between the decision to stop the program and the fence: both reach the program
            # at once when a platform signals every process.
            self.change(E.FENCE, reason=self.stopping.reason)
        why: dict[str, Any] = {
            "reason": self.last_exit,
            "exit": str(status) if str(status) != self.last_exit else "",
            "jobs_lost": lost,
            "swept": swept,
        }
        if event is E.FAIL:
            why |= post_mortem(self.reports, launched.relays[1].last, oom_kills_before=self._oom_kills)
        self.change(event, **{name: value for name, value in why.items() if value})

    def write_off(self) -> None:
        """Give the jobs a fate whose worker was killed, and has not been seen to end: the stop is over."""
        if not self.ended:
            self.shared.ledger.lose(self.slot, self.number, now(), cut=self._cut)

    # -- what is said to the program, and done to it --------------------------------------------------

    def say(self, message: WorkerHears) -> None:
        if self._channel is not None:
            self._channel.say(message)

    def send(self, number: signal.Signals) -> None:
        if self._launched is not None:
            self._launched.child.send(number)

    def hold(self, on: bool) -> None:
        """Have the worker accept nothing for as long as the hold lasts."""
        if not self.is_candidate:
            self.say(Hold(on=on))

    def take_over(self) -> None:
        """Let a candidate accept what the whole fleet accepts."""
        self.is_candidate = False
        self.hold(self.shared.is_held)

    def note_cut(self) -> None:
        """Note that the time of the jobs which still run is over, for a worker that can't tell."""
        self._cut |= frozenset(job.id for job in self.jobs if is_living(job))

    def dump(self) -> None:
        """Have the worker write its main thread's stack to its standard error; an opaque one can't."""
        if self._channel is not None:
            self.send(signal.SIGUSR2)

    def kill(self, **why: Any) -> None:
        """Enter KILLING, and SIGKILL the program and everything below it, in other sessions too."""
        if self.state is not S.KILLING:
            self.change(E.KILL, **why)
        self._kill_processes()

    def _kill_processes(self) -> None:
        launched = self._launched
        if launched is None or self.has_exited:
            return
        # A job that had ended by itself, under a worker that could not tell any more, was not cut.
        self.note_cut()
        below = descendants.tree(launched.child.pid)
        launched.child.send(signal.SIGKILL)
        descendants.kill(below, spares_trackers=True)  # the sweep that follows ends them
        if self.was_ready and self.shared.is_stopping:  # one that never was has nothing that could be lost
            killed = {"what": "worker", "slot": self.slot, "pid": launched.child.pid}
            self.shared.record.killed.append(killed)

    # -- what the program says ------------------------------------------------------------------------

    def _on_exit(self, status: ExitStatus) -> None:
        self.changed.notify()

    def _on_lost(self, wrong: str) -> None:
        self._channel_lost = True
        self.changed.notify()
        if wrong:
            self.log.warning("control channel closed", reason=wrong)

    def _on_message(self, message: WorkerSays) -> None:
        self.reports.counts_for_receipt = self.shared.is_stopping
        self.reports.take(message)
        self._follow(message)
        if isinstance(message, Fault):
            self._tell_fault(message.traceback)
        elif isinstance(message, HandoverOff) and message.agent_name not in self.shared.handover_off:
            self.shared.handover_off[message.agent_name] = message.reason
            self.log.warning("handover is switched off", agent_name=message.agent_name, reason=message.reason)
        self.changed.notify()
        self.shared.on_change()

    def _follow(self, message: WorkerSays) -> None:
        """Have the state follow what was said."""
        reports = self.reports
        beat = reports.beat
        registered = beat is not None and beat.registered
        if isinstance(message, Ready) and self.ready_at is not None:
            # Not the first registration: the LiveKit server was away, and has its rooms dispatched anew.
            served = told_rooms(self.shared.ledger.served_beside(self.slot, self.number))
            if served:
                self.say(Served(rooms=served))
        if isinstance(message, Ready | Beat):
            for name in self.shared.handover_off.keys() - self._told_off:
                self._told_off.add(name)
                self.say(HandoverOff(agent_name=name, reason=self.shared.handover_off[name]))
            self.is_silent = False
            if (
                self.state is S.STARTING
                and beat is not None
                and registered
                and beat.warm
                and reports.worker_id
            ):
                self.ready_at = self.ready_at or now()
                self.change(E.REGISTER, worker_id=reports.worker_id)
            elif self.state is S.STALLED:
                self.change(E.RECOVER)
            elif self.state is S.READY and not registered:
                self.change(E.UNREGISTER, reason="connection to the LiveKit server lost")
        elif isinstance(message, ProcessFailed):
            self.shared.process_failures[self.slot] += 1
        elif isinstance(message, Fenced) and self.state in (S.STARTING, S.READY, S.STALLED):
            self.change(
                E.FENCE, reason=reports.fence_reason
            )  # the worker was signalled, or has lost its server

    def _tell_fault(self, traceback: str) -> None:
        """Show a traceback of the user's own code once for each different one of a slot."""
        if traceback and traceback != self.shared.tracebacks.get(self.slot):
            self.log.error("target failed", reason=self.reports.fault, traceback=traceback)
        self.shared.tracebacks[self.slot] = traceback


def told_rooms(rooms: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return the rooms as `Served` has them, without those that would make the message too long."""
    told: list[str] = []
    size = 0
    for room in rooms:
        text = NUL.join(room)
        size += len(json.dumps(text)) + len(",")  # a character is up to 12 bytes of JSON
        if size > MAX_SERVED_BYTES:
            break
        told.append(text)
    return told


def is_living(job: JobEntry) -> bool:
    """Tell whether a job can still be cut: its call is not over, and its process lives or is yet to come."""
    return not job.is_over and (job.pid is None or descendants.each(job.pid) is not None)
