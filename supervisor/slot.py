"""One slot: its program is started, watched, restarted after a failure, and stopped within a budget.

`run` is the slot's life and `stop` its end; both wait on the same bell and never on each other. Every change
of state goes through `change`, which knows the table and writes the one log line.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from worker.clock import Bell, now
from worker.wire import Message

from . import family
from .budget import Deadlines
from .channel import Channel
from .errors import SpawnError, TransitionError
from .intensity import Restarts
from .launch import Launched, Launcher
from .reaper import ExitStatus
from .receipt import JobEntry, Ledger, ResourceEntry, StopRecord
from .states import ALIVE, SLOT_TABLE, SlotEvent, SlotState

E, S = SlotEvent, SlotState

SWEEP = 1.0
EX_CONFIG = 78


class Countdown(Protocol):
    """The deadlines of a stop as they stand; they may move while one waits."""

    reason: str
    deadlines: Deadlines


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """The last sign of life of a worker."""

    at: float
    lag_ms: float = 0.0
    load: float = 0.0
    rss_bytes: int = 0
    registered: bool = False
    accepting: bool = False


@dataclass(slots=True, kw_only=True)
class Shared:
    """What all slots of a supervisor write to."""

    ledger: Ledger
    record: StopRecord
    log: Any
    known_pids: set[int]
    on_change: Callable[[], None]
    sweep_unmarked: bool
    fence_seconds: list[float]


class Slot:
    """The place that one worker is supervised in; it survives replacements."""

    def __init__(
        self, number: int, *, launcher: Launcher, restarts: Restarts, shared: Shared, start_timeout: float
    ) -> None:
        self.number = number
        self.state = S.STOPPED
        self.since = now()
        self.generation = 0
        self.restarts = 0
        self.last_exit = ""
        self.agent_name = ""
        self.worker_id = ""
        self.beat: Beat | None = None
        self.config_error = ""
        self.first_load_over = False
        self.bell = Bell()
        self._launcher = launcher
        self._restarts = restarts
        self._shared = shared
        self._start_timeout = start_timeout
        self._log = shared.log.bind(slot=number)
        self._launched: Launched | None = None
        self._channel: Channel | None = None
        self._ready_at: float | None = None
        self._fenced_at: float | None = None
        self._fence_sent_at: float | None = None
        self._drained = False
        self._channel_lost = False
        self._killed_by_us = False
        self._last_fault = ""
        self._fault = ""
        self._stop_asked = False
        self._fencing = False

    # -- what others see ------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        launched = self._launched
        return launched.child.pid if launched is not None and self.state in ALIVE else None

    @property
    def is_alive(self) -> bool:
        return self.state in ALIVE

    @property
    def accepts(self) -> bool:
        """Whether the worker is registered and takes jobs; an opaque one has only its being up to say so."""
        if self.state is not S.READY:
            return False
        return self._launcher.is_opaque or (self.beat is not None and self.beat.accepting)

    @property
    def is_fencing(self) -> bool:
        """Whether the stop still waits for the worker to say that it accepts nothing more."""
        return self._fencing

    @property
    def jobs(self) -> list[JobEntry]:
        return self._shared.ledger.of(self.number, self.generation)

    def dump(self) -> None:
        """Have the worker write its main thread's stack to its standard error; an opaque one can't."""
        if self._launched is not None and self._channel is not None:
            self._launched.child.send(signal.SIGUSR2)

    # -- the one place where the state changes --------------------------------------------------------

    def change(self, event: SlotEvent, **why: Any) -> None:
        """Apply an event. Raises TransitionError when the table does not list it for this state."""
        try:
            after = SLOT_TABLE[self.state, event]
        except KeyError:
            raise TransitionError(f"slot {self.number}: {event.name} in state {self.state.name}") from None
        before, self.state, self.since = self.state, after, now()
        failed = after in (S.FAILED, S.QUARANTINED)
        write = self._log.warning if failed else self._log.info
        write("slot " + after.value, was=before.value, generation=self.generation, **why)
        self.bell.ring()
        self._shared.on_change()

    # -- life -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the program up until the slot is stopped or quarantined."""
        while not self._stop_asked:
            await self._live()
            self.first_load_over = True
            if self.config_error:  # no later start would find a better target
                await self.bell.until(lambda: self._stop_asked)
            if self._stop_asked:
                break
            uptime = 0.0 if self._ready_at is None else now() - self._ready_at
            delay = self._restarts.delay(now(), uptime=uptime)
            if delay is None:
                self.change(E.QUARANTINE, reason="too many failures", last_exit=self.last_exit)
                await self.bell.until(lambda: self._stop_asked)
                break
            self.restarts += 1
            self.change(E.RETRY, delay=round(delay, 3))
            due = now() + delay
            await self.bell.until(lambda: self._stop_asked, lambda due=due: due)  # type: ignore[misc]  # bound early
        if self.state is not S.STOPPED:
            self.change(E.STOP)

    async def _live(self) -> None:
        """Start the program, see it through to its end, and clean up after it."""
        self._reset()
        try:
            launched = self._launcher.start(self.number, self.generation, self._on_exit)
        except SpawnError as error:
            self.last_exit = str(error)
            if self.number == 0 and self.generation == 1:
                self.config_error = str(error)
            self.change(E.FAIL, reason=str(error))
            return
        self._launched = launched
        self._shared.known_pids.add(launched.child.pid)
        self.change(E.SPAWN, pid=launched.child.pid)
        try:
            if launched.control is None:
                self._ready_at = now()
                self.change(E.REGISTER)
            else:
                self._channel = await Channel.open(launched.control, self._on_message, self._on_lost)
            await self._start_in_time(launched)
            await self.bell.until(lambda: launched.child.status is not None)
        except asyncio.CancelledError:
            self._kill_tree(launched)  # the end of the whole stop; nothing may stay
            raise
        await self._clean_up(launched)

    async def see_out(self) -> None:
        """After a fault of ours in `run`: leave the worker to its stop, and clean up when it has ended."""
        launched = self._launched
        if launched is not None and self.is_alive:
            await self.bell.until(lambda: launched.child.status is not None)
            await self._clean_up(launched)

    def _reset(self) -> None:
        self.generation += 1
        self.beat = None
        self.worker_id = ""
        self._ready_at = self._fenced_at = self._fence_sent_at = None
        self._drained = self._killed_by_us = self._channel_lost = False
        self._fault = ""

    async def _start_in_time(self, launched: Launched) -> None:
        due = now() + self._start_timeout
        started = await self.bell.until(
            lambda: launched.child.status is not None or self.state is not S.STARTING, lambda: due
        )
        if started:
            return
        self.change(E.TERMINATE, reason=f"not registered within {self._start_timeout:g} s")
        self._say("close")
        grace = now() + 5.0
        if not await self.bell.until(lambda: launched.child.status is not None, lambda: grace):
            self.change(E.KILL)
            self._kill_tree(launched)

    async def _clean_up(self, launched: Launched) -> None:
        """The process has ended: nothing of it may stay."""
        child = launched.child
        if self._channel is not None:  # its last words may still be unread; end of file comes behind them
            due = now() + SWEEP
            await self.bell.until(lambda: self._channel_lost, lambda: due)
        swept, left = await self._sweep(launched)
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        for relay in launched.relays:
            relay.close()
        self._shared.known_pids.discard(child.pid)
        self._record_end(launched, child.status, swept, left)

    def _record_end(self, launched: Launched, status: ExitStatus | None, swept: int, left: int) -> None:
        shared = self._shared
        lost = shared.ledger.lose(
            self.number, self.generation, now(), "cut" if self._killed_by_us else "lost"
        )
        shared.record.swept += swept
        shared.record.left += left
        self.last_exit = self._fault or str(status)
        asked = self._stop_asked and status is not None and status.code in (0, 75)
        was_killing = self.state is S.KILLING and self._stop_asked
        event = E.EXIT if asked or was_killing else E.FAIL
        last_lines = b"\n".join(launched.relays[1].last).decode(errors="replace")
        why: dict[str, Any] = {
            "reason": self.last_exit,
            "exit": str(status),
            "jobs_lost": lost,
            "swept": swept,
        }
        if event is E.FAIL and last_lines and not self._fault:
            why["last_lines"] = last_lines
        self.change(event, **{name: value for name, value in why.items() if value})

    async def _sweep(self, launched: Launched) -> tuple[int, int]:
        """Kill what the worker left behind; return how many programs that were and how many are left."""
        programs = 0
        due = now() + SWEEP
        while True:
            adopted = family.adopted(self._shared.known_pids)
            if not adopted:
                return programs, 0
            found = family.marked(adopted, launched.mark, unmarked=self._shared.sweep_unmarked)
            if not found:
                return programs, 0
            programs += sum(1 for process in found if not family.is_framework(process))
            family.kill(found)
            if now() >= due:
                return programs, len(found)
            await asyncio.sleep(0.002)

    # -- the stop -------------------------------------------------------------------------------------

    def fence(self, reason: str) -> None:
        """Tell the worker to accept nothing more; `stop` does the rest."""
        self._stop_asked = True
        self._fence_sent_at = now()
        self._say("fence", reason=reason)

    async def stop(self, countdown: Countdown) -> None:
        """Fence, drain, close, terminate, kill: each until its deadline, and only as far as is needed."""
        self._stop_asked = True
        self.bell.ring()
        launched = self._launched
        if launched is None or not self.is_alive:
            return
        if self.state not in (S.DRAINING, S.TERMINATING, S.KILLING):
            self.change(E.FENCE, reason=countdown.reason)
        if self._channel is None:
            await self._stop_opaque(launched, countdown)
        else:
            await self._stop_worker(launched, countdown)
        if not self._ended(launched) and self.state is not S.KILLING:
            self.change(E.KILL)
        if not self._ended(launched):
            self._kill_tree(launched)
            if self._was_ready:  # one that never was has nothing that could be lost
                killed = {"what": "worker", "slot": self.number, "pid": launched.child.pid}
                self._shared.record.killed.append(killed)
            await self.bell.until(
                lambda: self._ended(launched), lambda: countdown.deadlines.terminate_at + SWEEP * 4
            )

    async def _stop_opaque(self, launched: Launched, countdown: Countdown) -> None:
        # Once: a second SIGTERM makes many programs, livekit's own command line among them, drop their calls.
        launched.child.send(signal.SIGTERM)
        await self.bell.until(lambda: self._ended(launched), lambda: countdown.deadlines.terminate_at)

    async def _stop_worker(self, launched: Launched, countdown: Countdown) -> None:
        if self.state is S.TERMINATING:  # it was being taken down already, for not becoming ready
            await self.bell.until(lambda: self._ended(launched), lambda: countdown.deadlines.terminate_at)
            return
        began = now()
        shares = countdown.deadlines.shares
        if self._fence_sent_at is None:
            self.fence(countdown.reason)
        self._say("drain", seconds=max(0.0, countdown.deadlines.drain_at - began), close=shares.close)
        if self._was_ready:
            await self._await_fence(launched, countdown, began)
            drained = await self.bell.until(
                lambda: self._ended(launched) or self._drained, lambda: countdown.deadlines.drain_at
            )
            if not drained:
                self._say("hurry", close=shares.close)
        if self._ended(launched):
            return
        self.change(E.CLOSE)
        # A worker that drained early has its close share from now, and not the rest of grace to hang in.
        share = shares.close if self._was_ready else shares.terminate
        close_by = now() + share
        await self.bell.until(
            lambda: self._ended(launched), lambda: min(close_by, countdown.deadlines.close_at)
        )
        if self._ended(launched):
            return
        self.change(E.TERMINATE)
        self._say("close")
        terminate_by = now() + shares.terminate
        await self.bell.until(
            lambda: self._ended(launched), lambda: min(terminate_by, countdown.deadlines.terminate_at)
        )

    async def _await_fence(self, launched: Launched, countdown: Countdown, began: float) -> None:
        self._fencing = True
        try:
            fenced = await self.bell.until(
                lambda: self._ended(launched) or self._fenced_at is not None,
                lambda: countdown.deadlines.fence_at,
            )
        finally:
            self._fencing = False
            self._shared.on_change()
        if self._fenced_at is not None:
            self._shared.fence_seconds.append(max(0.0, self._fenced_at - (self._fence_sent_at or began)))
        elif not fenced:
            self._shared.record.unacknowledged.append(self.number)
            self._log.warning("fence not acknowledged", after=round(now() - began, 3))

    @property
    def _was_ready(self) -> bool:
        return self._ready_at is not None

    def _ended(self, launched: Launched) -> bool:
        return launched.child.status is not None

    def _kill_tree(self, launched: Launched) -> None:
        """SIGKILL the worker and everything below it, descendants in other sessions too."""
        self._killed_by_us = True
        below = family.tree(launched.child.pid)
        launched.child.send(signal.SIGKILL)
        family.kill(below)

    def _say(self, type: str, **fields: Any) -> None:
        if self._channel is not None:
            self._channel.say(type, **fields)

    # -- what the worker says -------------------------------------------------------------------------

    def _on_exit(self, status: ExitStatus) -> None:
        self.bell.ring()

    def _on_lost(self, wrong: str) -> None:
        self._channel_lost = True
        self.bell.ring()
        if wrong:
            self._log.warning("control channel closed", reason=wrong)

    def _on_message(self, message: Message) -> None:
        handle = getattr(self, f"_on_{message['type']}", None)
        if handle is not None:
            handle(message)

    def _on_hello(self, message: Message) -> None:
        self._log.debug("worker says hello", pid=message.get("pid"))

    def _on_loaded(self, message: Message) -> None:
        self.agent_name = str(message.get("agent_name", ""))
        self.first_load_over = True
        self.bell.ring()
        self._shared.on_change()

    def _on_ready(self, message: Message) -> None:
        self.worker_id = str(message["worker_id"])
        if self._ready_at is None:
            self._ready_at = now()
        accepting = self._fenced_at is None
        self.beat = Beat(at=now(), registered=True, accepting=accepting)
        if self.state is S.STARTING:
            self.change(E.REGISTER, worker_id=self.worker_id)

    def _on_beat(self, message: Message) -> None:
        self.beat = Beat(
            at=now(),
            lag_ms=float(message["lag_ms"]),
            load=float(message["load"]),
            rss_bytes=int(message["rss_bytes"]),
            registered=bool(message["registered"]),
            accepting=bool(message["accepting"]),
        )
        if self.state is S.READY and not self.beat.registered:
            self.change(E.UNREGISTER, reason="connection to the LiveKit server lost")
        elif self.state is S.STARTING and self.beat.registered and self._was_ready:
            self.change(E.REGISTER, worker_id=self.worker_id)
        self._shared.on_change()

    def _on_job_started(self, message: Message) -> None:
        job = message["job"]
        entry = JobEntry(
            id=str(job["id"]),
            room=str(job["room"]),
            dispatch_id=str(job["dispatch_id"]),
            slot=self.number,
            generation=self.generation,
            accepted_at=float(job["accepted_at"]),
            pid=job["pid"],
        )
        self._shared.ledger.start(entry)
        self._shared.on_change()

    def _on_job_ended(self, message: Message) -> None:
        fate = str(message["fate"])
        self._shared.ledger.end(
            self.number, self.generation, str(message["id"]), fate, float(message["seconds"])
        )
        if fate in ("cut", "lost"):
            self._log.warning("job " + fate, job_id=message["id"], seconds=message["seconds"])
        self._shared.on_change()

    def _on_fenced(self, message: Message) -> None:
        self._fenced_at = now()
        if self.beat is not None:
            self.beat = Beat(at=now(), registered=self.beat.registered)
        if self.state in (
            S.STARTING,
            S.READY,
            S.STALLED,
        ):  # nobody here asked: the worker itself was signalled
            self.change(E.FENCE, reason=str(message.get("reason", "")))
        self.bell.ring()

    def _on_drained(self, message: Message) -> None:
        self._drained = True
        self.bell.ring()

    def _on_resource(self, message: Message) -> None:
        fate = message["fate"]
        entry = ResourceEntry(
            name=str(message["name"]), fate=fate, slot=self.number, counts=dict(message["counts"])
        )
        if self._stop_asked:
            self._shared.record.resources.append(entry)

    def _on_shield(self, message: Message) -> None:
        self._log.error("shield does not hold", pid=message.get("pid"), open_to=message.get("open_to"))

    def _on_fault(self, message: Message) -> None:
        self._fault = str(message["message"])
        traceback = str(message.get("traceback", ""))
        if traceback and traceback != self._last_fault:
            self._log.error("target failed", reason=self._fault, traceback=traceback)
        self._last_fault = traceback
        if message.get("exit") == EX_CONFIG and self.number == 0 and self.generation == 1:
            self.config_error = self._fault
