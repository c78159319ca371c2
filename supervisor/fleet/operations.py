"""The work that an operator asks of a running supervisor beside a stop: reload, recycle, scale.

Each runs in the background and has a record, which can be looked at until it is done. Replacements that are
asked for, or due, share `max_surge`: no more workers start at a time than the host was meant to bear. A
replacement for a lost or stalled worker does not wait for `max_surge`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any, Literal

from lastcall.supervisor.config import Config
from lastcall.supervisor.errors import ConfigError, Refused
from lastcall.supervisor.fleet.fleet import Fleet, pick_victims
from lastcall.supervisor.fleet.generation import Generation
from lastcall.supervisor.fleet.slot import Slot
from lastcall.supervisor.processes.launch import Launcher
from lastcall.supervisor.receipt import JobEntry
from lastcall.worker.base.clock import now
from lastcall.worker.base.records import dataclass
from lastcall.worker.base.wire import HandOver, StopCause

# Operations that can still be looked at. Ours: `--wait` asks several times a second.
MAX_RECENT_OPERATIONS = 16

OperationVerb = Literal["reload", "recycle", "scale", "handover"]
# The log events of each verb, whole, so that `grep` finds them.
BEGINS: dict[OperationVerb, str] = {
    "reload": "reload begins",
    "recycle": "recycle begins",
    "scale": "scale begins",
    "handover": "handover begins",
}
DONE: dict[OperationVerb, str] = {
    "reload": "reload done",
    "recycle": "recycle done",
    "scale": "scale done",
    "handover": "handover done",
}
FAILED: dict[OperationVerb, str] = {
    "reload": "reload failed",
    "recycle": "recycle failed",
    "scale": "scale failed",
    "handover": "handover failed",
}
# Seconds for the answer of a worker to a handover, beside `[handover] wait` and `patience`. Ours: a successor
# that can't be removed takes 30 s.
HANDOVER_WITHIN = 60.0
# Seconds for it after the end of the job. Ours: a worker looks for the successor for 3 s (`SHOWN_WITHIN` in
# worker/handovers.py).
TOLD_WITHIN = 5.0


@dataclass(slots=True, kw_only=True)
class Operation:
    """One thing asked for. `done` of `of` slots have been dealt with."""

    id: int
    verb: OperationVerb
    state: Literal["running", "done", "failed"] = "running"
    reason: str = ""
    done: int = 0
    of: int = 0
    # The options and variables whose new values a reload has read, and which take effect at the next restart.
    at_next_restart: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reread:
    """The new program of a reload: `launcher` starts it, under `config`.

    `settle` is called once: with True when the program has taken over for good, with False when it was
    refused.
    """

    config: Config
    launcher: Launcher
    at_next_restart: tuple[str, ...]
    settle: Callable[[bool], None]


Work = Coroutine[Any, Any, str]


class Operations:
    """Runs operations on one fleet.

    `reread` returns the new program of a reload, or raises ConfigError. `on_reload` hears
    1 when a reload begins, and -1 when it is over, with the reason why it failed.

    No operation has to be told of a stop: the slots that it waits for end in the stop, and say so.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        reread: Callable[[], asyncio.Future[Reread]],
        on_reload: Callable[[int, str], None],
        log: Any,
    ) -> None:
        self.recent: deque[Operation] = deque(maxlen=MAX_RECENT_OPERATIONS)
        self.counts: Counter[tuple[str, str]] = Counter()
        self._fleet = fleet
        self._reread = reread
        self._on_reload = on_reload
        self._log = log
        self._ids = 0
        self._group: asyncio.TaskGroup | None = None
        self._reloading = asyncio.Lock()
        self._scaling = asyncio.Lock()
        self._queued_reload: Operation | None = None
        # The operations after which the old workers hand their calls over.
        self._hands_over: set[int] = set()
        self._surge = asyncio.Semaphore(fleet.config.reload.max_surge)

    async def run(self) -> None:
        """Own the tasks of all operations, until a stop has begun and they have seen it."""
        async with asyncio.TaskGroup() as self._group:
            await self._fleet.changed.until(lambda: self._fleet.is_stopping)

    # -- what may be asked for ------------------------------------------------------------------------

    def reload(self, *, hands_over: bool = False) -> Operation:
        """Replace every worker by one of the code and configuration that are there now. Raises Refused.

        `hands_over`: the calls of the old workers go on elsewhere at once, where that is possible.
        """
        if self._queued_reload is not None:
            # It has not begun, and will read everything afresh when it does.
            self._hands_over |= {self._queued_reload.id} if hands_over else set()
            return self._queued_reload
        operation = self._begin("reload", of=len(self._fleet.slots))
        self._hands_over |= {operation.id} if hands_over else set()
        self._queued_reload = operation
        self._fleet.shared.handover_off.clear()
        self._do(operation, self._reload(operation))
        return operation

    def recycle(self, number: int, reason: str = "recycle", *, hands_over: bool = False) -> Operation:
        """Replace the worker of one slot by one of the same program. Raises Refused.

        `hands_over` is as in a reload.
        """
        slot = self._fleet.slot(number)
        if slot is None:
            known = ", ".join(str(slot.number) for slot in self._fleet.slots)
            raise Refused(f"there is no slot {number}; expected one of {known}")
        operation = self._begin("recycle", of=1)
        self._hands_over |= {operation.id} if hands_over else set()
        self._do(operation, self._recycle(operation, slot, reason))
        return operation

    def hand_over(self, job_id: str) -> Operation:
        """Have a call go on in another job, of whatever worker takes it. Raises Refused."""
        successor = self._fleet.ledger.successor_of(job_id)
        if successor:
            raise Refused(f"job {job_id!r} was handed over already, to job {successor!r}")
        entry = self._fleet.ledger.find(job_id)
        generation = None if entry is None else self._fleet.find(entry.slot, entry.generation)
        if entry is None or generation is None:
            raise Refused(f"there is no job {job_id!r}; lastcall status has the running ones")
        if not generation.is_connected:
            raise Refused(f"the worker of job {job_id!r} can't be told anything")
        operation = self._begin("handover", of=1)
        self._do(operation, self._hand_over(operation, generation, entry))
        return operation

    def scale(self, workers: int) -> Operation:
        """Have so many workers: start more, or drain some. Raises Refused."""
        if not 1 <= workers <= 1000:
            raise Refused(f"{workers} workers; expected 1 to 1000 (hold pauses them all, drain stops)")
        operation = self._begin("scale", of=abs(workers - self.wanted))
        self._do(operation, self._scale(operation, workers))
        return operation

    @property
    def wanted(self) -> int:
        """How many slots there are, not counting those that are being taken away."""
        return sum(not slot.is_stopping for slot in self._fleet.slots)

    def find(self, id: int) -> Operation:
        """Return a recent operation. Raises Refused when it is too long ago, or never was."""
        for operation in self.recent:
            if operation.id == id:
                return operation
        raise Refused(f"no operation {id} among the last {MAX_RECENT_OPERATIONS}")

    # -- how it is done -------------------------------------------------------------------------------

    def _begin(self, verb: OperationVerb, *, of: int) -> Operation:
        if self._fleet.is_stopping or self._group is None:
            raise Refused(f"{verb}: the supervisor is stopping")
        self._ids += 1
        operation = Operation(id=self._ids, verb=verb, of=of)
        self.recent.append(operation)
        return operation

    def _do(self, operation: Operation, work: Work) -> None:
        assert self._group is not None
        self._group.create_task(self._follow(operation, work), name=f"{operation.verb}-{operation.id}")

    async def _follow(self, operation: Operation, work: Work) -> None:
        self._log.info(BEGINS[operation.verb], operation=operation.id, slots=operation.of)
        began = now()
        try:
            operation.reason = await work
        except Exception as error:  # a fault in an operation must not take the workers with it
            operation.reason = f"fault in lastcall: {error!r}"
            self._log.error("fault in lastcall", operation=operation.id, exc_info=True)
        operation.state = "failed" if operation.reason else "done"
        self._hands_over.discard(operation.id)
        self.counts[operation.verb, operation.state] += 1
        seconds = round(now() - began, 3)
        if operation.reason:
            self._log.error(
                FAILED[operation.verb], operation=operation.id, reason=operation.reason, seconds=seconds
            )
        else:
            self._log.info(DONE[operation.verb], operation=operation.id, seconds=seconds)
        self._fleet.changed.notify()

    async def _reload(self, operation: Operation) -> str:
        async with self._reloading:
            self._queued_reload = None
            self._on_reload(1, "")
            why = "fault in lastcall"
            try:
                why = await self._roll(operation)
            finally:
                self._on_reload(-1, why)
            return why

    async def _roll(self, operation: Operation) -> str:
        reading = self._reread()
        reading.add_done_callback(lambda _: self._fleet.changed.notify())
        await self._fleet.changed.until(lambda: reading.done() or self._fleet.is_stopping)
        if not reading.done():
            reading.cancel()
            return "the supervisor is stopping"
        try:
            read = reading.result()
        except ConfigError as error:
            return str(error)
        operation.at_next_restart = read.at_next_restart
        slots = [slot for slot in self._fleet.slots if not slot.is_stopping]
        operation.of = len(slots)
        wanted, before = self.wanted, self._fleet.config.workers
        why = "fault in lastcall"
        try:
            why = await self._try(operation, slots, read.launcher)
            if not why:
                self._fleet.commit(read.config, read.launcher)
        finally:
            if why:
                read.launcher.end_image()
            read.settle(not why)
        if why:
            return why
        async with asyncio.TaskGroup() as group:
            rest = [
                group.create_task(self._replace(operation, slot, read.launcher, "reload"))
                for slot in slots[1:]
            ]
        reasons = [task.result() for task in rest if task.result()]
        if read.config.workers != before and wanted == before:
            operation.of += abs(read.config.workers - wanted)
            await self._resize(operation, read.config.workers)
        return "; ".join(reasons)

    async def _try(self, operation: Operation, slots: list[Slot], launcher: Launcher) -> str:
        """Have one slot take the new program first; return why it has not.

        If the program is no good, no other slot has tried it.
        """
        if not slots:
            return "the supervisor is stopping"
        why = await self._replace(operation, slots[0], launcher, "reload")
        if not why and not operation.done:
            why = f"slot {slots[0].number} was taken away before it could try the new one"
        return why and f"the old program keeps serving: {why}"

    async def _recycle(self, operation: Operation, slot: Slot, reason: str) -> str:
        if slot.is_stopping:
            return f"slot {slot.number} is being taken away"
        return await self._replace(operation, slot, self._fleet.launcher, reason)

    async def _hand_over(self, operation: Operation, generation: Generation, entry: JobEntry) -> str:
        before = entry.tries
        generation.say(HandOver(id=entry.id, reason="lastcall handover"))
        config = self._fleet.config.handover
        due = now() + HANDOVER_WITHIN + config.wait + config.patience
        await self._fleet.changed.until(
            lambda: entry.tries > before or entry.fate is not None or self._fleet.is_stopping, lambda: due
        )
        if entry.fate is not None and entry.tries == before:  # a successor may speak all the same
            due = min(due, now() + TOLD_WITHIN)
            await self._fleet.changed.until(
                lambda: entry.tries > before or not generation.is_connected or self._fleet.is_stopping,
                lambda: due,
            )
        operation.done = int(bool(entry.successor))
        if entry.successor:
            return ""
        return entry.handover if entry.tries > before else "the job has ended, or its worker does not answer"

    async def _replace(self, operation: Operation, slot: Slot, launcher: Launcher, reason: str) -> str:
        async with self._surge:
            if slot.is_stopping:
                return ""  # scaled away meanwhile
            verb: StopCause = "reload" if operation.verb == "reload" else "recycle"
            hands_over = operation.id in self._hands_over
            before = list(slot.leaving)
            why = await slot.replace(reason, launcher, cause="handover" if hands_over else verb)
            if not why and hands_over:
                for old in slot.leaving:
                    if old not in before:
                        old.say(HandOver(id="", reason=verb))
        operation.done += not why
        return f"slot {slot.number}: {why}" if why else ""

    async def _scale(self, operation: Operation, workers: int) -> str:
        async with self._scaling:
            operation.of = abs(workers - self.wanted)
            return await self._resize(operation, workers)

    async def _resize(self, operation: Operation, workers: int) -> str:
        more = workers - self.wanted
        for _ in range(more):
            async with self._surge:
                slot = await self._fleet.grow()
                if slot is None:
                    return "the supervisor is stopping"
                why = await _first_start(slot)
            if why:
                return f"slot {slot.number}: {why}"
            operation.done += 1
        victims = pick_victims(self._fleet.slots, -more) if more < 0 else []
        async with asyncio.TaskGroup() as group:
            for victim in victims:
                group.create_task(self._shrink(operation, victim))
        return ""

    async def _shrink(self, operation: Operation, slot: Slot) -> None:
        await self._fleet.shrink(slot, "scaled down")
        operation.done += 1


async def _first_start(slot: Slot) -> str:
    """Wait until a new slot's worker has taken up its work; return why it has not."""
    first = slot.current
    await slot.changed.until(lambda: first.is_usable or first.ended or (first.is_opaque and first.was_ready))
    return first.last_exit if first.ended else ""
