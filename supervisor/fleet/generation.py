"""One generation of a slot: one program, from its spawn until it has ended and is swept.

Every change of state goes through `change`, which knows the table and writes the one log line.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lastcall.supervisor.config import Config
from lastcall.supervisor.errors import SpawnError, TransitionError
from lastcall.supervisor.fleet.histogram import Histogram
from lastcall.supervisor.fleet.states import ALIVE, SLOT_TABLE, SlotEvent, SlotState
from lastcall.supervisor.fleet.stopper import Ending, Stopper
from lastcall.supervisor.fleet.worker_view import WorkerView
from lastcall.supervisor.processes import cgroup, descendants
from lastcall.supervisor.processes.launch import Launched, Launcher
from lastcall.supervisor.processes.reaper import ExitStatus
from lastcall.supervisor.processes.worker_channel import Channel
from lastcall.supervisor.receipt import JobEntry, Ledger, StopRecord
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.wire import (
    OF_WORKER,
    Beat,
    Fault,
    Fenced,
    Hold,
    Ready,
    Terminate,
    WorkerHears,
    WorkerSays,
)

E, S = SlotEvent, SlotState

SWEEP = 1.0
TAKEN_DOWN_IN = 5.0


@dataclass(slots=True, kw_only=True)
class Shared:
    """What all generations of a supervisor read and write."""

    config: Config
    ledger: Ledger
    record: StopRecord
    log: Any
    known_pids: set[int]
    on_change: Callable[[], None]
    may_sweep_unmarked: Callable[[], bool]
    fence_seconds: Histogram
    drain_seconds: Histogram
    is_stopping: bool = False
    is_held: bool = False
    # A fault of ours ends the supervisor: the workers see its end and drain by themselves.
    is_abandoned: bool = False
    # The last traceback of the user's own code that was shown, by slot.
    tracebacks: dict[int, str] = field(default_factory=dict)


class Generation:
    """One program of one slot. `ended` is true once nothing of it is left."""

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
        self.is_silent = False
        # A candidate takes no job before it has proved that it could do one.
        self.is_candidate = False
        self.reports = WorkerView(slot, number, ledger=shared.ledger, record=shared.record, log=self.log)
        self.stopper = Stopper(self)
        self.launcher = launcher
        self._launched: Launched | None = None
        self._channel: Channel[WorkerHears, WorkerSays] | None = None
        self._channel_lost = False
        self._cut: frozenset[str] = frozenset()
        self._fenced_since: float | None = None
        self._oom_kills: int | None = None

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
    def was_ready(self) -> bool:
        return self.ready_at is not None

    @property
    def accepts(self) -> bool:
        """Whether the worker is registered and takes jobs; an opaque one has only its being up to say so."""
        if self.state is not S.READY:
            return False
        beat = self.reports.beat
        return self.is_opaque or (beat is not None and beat.accepting)

    @property
    def is_usable(self) -> bool:
        """Whether it could take over: registered and warm, or, when opaque, up for a while."""
        if self.state is not S.READY or self.ready_at is None:
            return False
        if self.is_opaque:
            return now() >= self.usable_at
        beat = self.reports.beat
        return beat is not None and beat.registered and beat.warm

    @property
    def usable_at(self) -> float:
        """When an opaque program counts as one that works: it says nothing itself."""
        assert self.ready_at is not None
        return self.ready_at + self.shared.config.reload.settle

    @property
    def is_leaving(self) -> bool:
        """Whether it goes down unasked: it was signalled itself, or its server is lost for good."""
        fenced = self.reports.fenced_at is not None and self.was_ready
        return fenced and not self.stopper.is_asked and not self.ended

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
        write("slot " + after.value, was=before.value, **why)
        if event is E.FENCE:
            self._fenced_since = self.since
        elif self._fenced_since is not None and after in (S.CLOSING, S.STOPPED):
            self.shared.drain_seconds.observe(self.since - self._fenced_since)
            self._fenced_since = None
        self.changed.notify()
        self.shared.on_change()

    # -- life -----------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Start the program, see it through to its end, and clean up after it."""
        if self.stopper.is_asked:  # between the decision to start it and now
            self._end()
            return
        try:
            launched = self.launcher.start(self.slot, self.number, self._on_exit)
        except SpawnError as error:
            self.last_exit = str(error)
            self.config_error = str(error)
            self.change(E.FAIL, reason=str(error))
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
                self.stopper.repeat()
            await self._start_in_time()
            await self.changed.until(lambda: self.has_exited)
        except asyncio.CancelledError:
            if not self.shared.is_abandoned:
                self.kill()  # the end of the whole stop; nothing may stay
                launched.clear()
            raise
        await self._clean_up(launched)

    async def see_out(self) -> None:
        """After a fault of ours in `live`: leave the worker to its stop, and clean up when it has ended."""
        if self._launched is not None and self.is_alive:
            await self.changed.until(lambda: self.has_exited)
            await self._clean_up(self._launched)

    async def stop(self, ending: Ending) -> None:
        """Fence, drain, close, terminate, kill: each until its deadline, and only as far as is needed."""
        await self.stopper.stop(ending)

    async def _start_in_time(self) -> None:
        timeout = self.shared.config.start.timeout
        due = now() + timeout
        started = await self.changed.until(
            lambda: self.has_exited or self.state is not S.STARTING or self.stopper.is_asked, lambda: due
        )
        if started:
            return
        self.last_exit = f"not registered within {timeout:g} s"
        self.change(E.TERMINATE, reason=self.last_exit)
        self.say(Terminate())
        grace = now() + TAKEN_DOWN_IN
        if not await self.changed.until(lambda: self.has_exited, lambda: grace):
            self.change(E.KILL)
            self.kill()

    async def _clean_up(self, launched: Launched) -> None:
        """The process has ended: nothing of it may stay."""
        child = launched.child
        if self._channel is not None:  # its last words may still be unread; end of file comes behind them
            due = now() + SWEEP
            await self.changed.until(lambda: self._channel_lost, lambda: due)
        swept, left = await self._sweep(launched)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        launched.close()
        self.shared.known_pids.discard(child.pid)
        self._record_end(launched, child.status, swept, left)
        self._end()

    def _end(self) -> None:
        self.ended = True
        self.changed.notify()
        self.shared.on_change()

    def _record_end(self, launched: Launched, status: ExitStatus | None, swept: int, left: int) -> None:
        shared = self.shared
        lost = shared.ledger.lose(self.slot, self.number, now(), cut=self._cut)
        shared.record.swept += swept
        shared.record.left += left
        self.last_exit = self.reports.fault or self.last_exit or str(status)
        if self.reports.is_config_error:
            self.config_error = self.reports.fault
        as_asked = self.stopper.is_asked and (self.state is S.KILLING or self._ended_well(status))
        event = E.EXIT if as_asked else E.FAIL
        why: dict[str, Any] = {
            "reason": self.last_exit,
            "exit": str(status) if str(status) != self.last_exit else "",
            "jobs_lost": lost,
            "swept": swept,
        }
        if event is E.FAIL:
            why |= self._post_mortem(launched)
        self.change(event, **{name: value for name, value in why.items() if value})

    def _ended_well(self, status: ExitStatus | None) -> bool:
        """Whether an end that was asked for is one that a program may well give."""
        if status is None:
            return False
        if self.is_opaque:  # its exit code is its own affair, and to die of SIGTERM is the default
            return status.code is not None or status.signal is signal.SIGTERM
        return status.code in (Exit.CLEAN, Exit.FORCED)

    def _post_mortem(self, launched: Launched) -> dict[str, Any]:
        """Return what helps at three in the morning: the last sign of life and the last words."""
        facts: dict[str, Any] = {}
        if self.reports.beat is not None:
            facts["last_beat_s"] = round(now() - self.reports.beat.at, 3)
        kills = cgroup.oom_kills()
        if kills is not None and self._oom_kills is not None and kills > self._oom_kills:
            facts["oom_kills_meanwhile"] = kills - self._oom_kills
        last_lines = b"\n".join(launched.relays[1].last).decode(errors="replace")
        if last_lines and not self.reports.fault:
            facts["last_lines"] = last_lines
        return facts

    async def _sweep(self, launched: Launched) -> tuple[int, int]:
        """Kill what the worker left behind; return how many programs that were and how many are left."""
        programs = 0
        due = now() + SWEEP
        while True:
            adopted = descendants.adopted(self.shared.known_pids)
            if not adopted:
                return programs, 0
            found = descendants.marked(adopted, launched.mark, unmarked=self.shared.may_sweep_unmarked())
            if not found:
                return programs, 0
            programs += sum(1 for process in found if not descendants.is_framework(process))
            descendants.kill(found)
            if now() >= due:
                return programs, len(found)
            await asyncio.sleep(0.002)

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

    def dump(self) -> None:
        """Have the worker write its main thread's stack to its standard error; an opaque one can't."""
        if self._channel is not None:
            self.send(signal.SIGUSR2)

    def kill(self) -> None:
        """SIGKILL the program and everything below it, descendants in other sessions too."""
        launched = self._launched
        if launched is None or self.has_exited:
            return
        # What ended by itself under a worker that could not tell any more was not ended by us.
        self._cut |= frozenset(job.id for job in self.jobs if is_living(job))
        below = descendants.tree(launched.child.pid)
        launched.child.send(signal.SIGKILL)
        descendants.kill(below)
        if self.was_ready and self.shared.is_stopping:  # one that never was has nothing that could be lost
            killed = {"what": "worker", "slot": self.slot, "pid": launched.child.pid}
            self.shared.record.killed.append(killed)

    def on_fence(self, seconds: float | None) -> None:
        """Note the acknowledgement of the fence, or that there was none."""
        if seconds is not None:
            self.shared.fence_seconds.observe(seconds)
        elif self.shared.is_stopping:
            self.shared.record.unacknowledged.append(self.slot)
        self.shared.on_change()

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
        self.changed.notify()
        self.shared.on_change()

    def _follow(self, message: WorkerSays) -> None:
        """Have the state follow what was said."""
        reports = self.reports
        registered = reports.beat is not None and reports.beat.registered
        if isinstance(message, Ready | Beat):
            self.is_silent = False
            if self.ready_at is None and isinstance(message, Ready) and self.state is S.STARTING:
                self.ready_at = now()
            if self.state is S.STARTING and registered and self.was_ready:
                self.change(E.REGISTER, worker_id=reports.worker_id)
            elif self.state is S.STALLED:
                self.change(E.RECOVER)
            elif self.state is S.READY and not registered:
                self.change(E.UNREGISTER, reason="connection to the LiveKit server lost")
        elif isinstance(message, Fenced) and self.state in (S.STARTING, S.READY, S.STALLED):
            self.change(E.FENCE, reason=reports.fence_reason)  # nobody here asked

    def _tell_fault(self, traceback: str) -> None:
        """Show a traceback of the user's own code once for each different one of a slot."""
        if traceback and traceback != self.shared.tracebacks.get(self.slot):
            self.log.error("target failed", reason=self.reports.fault, traceback=traceback)
        self.shared.tracebacks[self.slot] = traceback


def is_living(job: JobEntry) -> bool:
    """Tell whether a job's process lives; one that was given none yet counts as living."""
    return job.pid is None or descendants.each(job.pid) is not None
