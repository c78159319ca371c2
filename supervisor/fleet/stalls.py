"""Watches the beats, and replaces workers whose event loop is stuck.

A worker beats every `[stall] beat` seconds. A worker that has missed `misses` beats is stalled: its stack is
logged, and a replacement is started. The stalled worker is stopped once the replacement has taken over, and
its jobs have time to end. A supervisor that was itself stopped, or starved, finds every beat late. So a look
that comes late by more than a beat judges no worker. Before a look judges, it lets the sockets be read.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

from lastcall.supervisor.config import Recycle
from lastcall.supervisor.fleet.fleet import Fleet
from lastcall.supervisor.fleet.generation import Generation
from lastcall.supervisor.fleet.operations import Operations
from lastcall.supervisor.fleet.slot import Slot
from lastcall.supervisor.fleet.states import SlotEvent, SlotState
from lastcall.supervisor.processes import descendants
from lastcall.worker.base.clock import now
from lastcall.worker.base.plurals import counted

# Seconds before a recycle that did not come about is tried again. Ours: a worker needs some to start.
RECYCLE_AGAIN_AFTER = 60.0
# Turns of the loop in which everything that has arrived is read: one for the selector, one for the protocol's
# callback, one to spare.
READ_TURNS = 3
# The share of `max_age` by which ages are spread. Ours: workers started together don't leave together.
AGE_JITTER = 0.1
# The states in which a worker owes a beat.
BEATS_IN = frozenset({SlotState.READY, SlotState.DRAINING, SlotState.CLOSING})


class Watch:
    """Looks at every generation that beats, as seldom as it can."""

    def __init__(self, fleet: Fleet, operations: Operations, *, log: Any) -> None:
        self.stalls = 0
        self._fleet = fleet
        self._operations = operations
        self._log = log
        self._not_before: dict[int, float] = {}

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as self._group:
            while True:
                await self._fleet.changed.until(lambda: any(self._beating()))
                due = self._next_look()
                await asyncio.sleep(max(0.0, due - now()))
                if now() - due > self._fleet.config.stall.beat:
                    continue  # the supervisor itself is late
                for _ in range(READ_TURNS):
                    await asyncio.sleep(0)
                self._look()

    def _beating(self) -> list[Generation]:
        """Return the generations that owe a beat."""
        return [generation for generation in self._fleet.generations if _owes_beats(generation)]

    def _next_look(self) -> float:
        stall = self._fleet.config.stall
        patience = stall.beat * stall.misses
        beating = self._beating()
        if any(generation.is_silent for generation in beating):
            return now() + stall.beat  # the ends of its jobs' processes wake nothing
        dues = [g.reports.beat.at + patience for g in beating if g.reports.beat is not None]
        return max(min(dues, default=now() + patience), now() + stall.beat)

    def _look(self) -> None:
        stall = self._fleet.config.stall
        for slot in list(self._fleet.slots):
            for generation in slot.generations:
                beat = generation.reports.beat
                if beat is None or not _owes_beats(generation):
                    continue
                if now() - beat.at >= stall.beat * stall.misses:
                    self._found_silent(slot, generation)
                elif generation is slot.current and not self._fleet.is_stopping:
                    self._recycle_if_due(slot, generation)

    # -- stuck ----------------------------------------------------------------------------------------

    def _found_silent(self, slot: Slot, generation: Generation) -> None:
        if not generation.is_silent:
            generation.is_silent = True
            self.stalls += 1
            self._show(generation)
            if generation.state is SlotState.READY:
                assert generation.reports.beat is not None
                generation.change(SlotEvent.STALL, last_beat_s=round(now() - generation.reports.beat.at, 1))
                if not self._fleet.is_stopping:
                    self._group.create_task(self._replace(slot, generation), name=f"stalled-{slot.number}")
        generation.changed.notify()

    def _show(self, generation: Generation) -> None:
        """Have the stuck loop's stack written, or say why there is none."""
        assert generation.pid is not None
        state, where = descendants.look_at(generation.pid)
        if state == "stopped":
            self._log.warning(
                "worker is stopped: no stack to show", slot=generation.slot, pid=generation.pid, state=state
            )
            return
        self._log.warning(
            "worker does not beat: its stack follows on its standard error",
            slot=generation.slot,
            pid=generation.pid,
            state=state,
            waits_in=where,
        )
        generation.dump()

    async def _replace(self, slot: Slot, stalled: Generation) -> None:
        why = await slot.replace(
            "stalled",
            self._fleet.launcher,
            cause="stall",
            is_wanted=lambda: stalled.is_silent and not stalled.ended,
        )
        if not why or self._fleet.is_stopping or stalled.ended:
            return
        if not stalled.is_silent:
            self._log.info("worker beats again and is kept", slot=slot.number)
            return
        # Nothing better can be had. It is ended all the same, and the slot's back-off does the rest.
        self._log.error("stalled worker could not be replaced", slot=slot.number, reason=why)
        due = now() + self._fleet.config.stall.grace
        await slot.changed.until(
            lambda: stalled.ended or not stalled.is_silent or not stalled.has_living_jobs(), lambda: due
        )
        if stalled.is_silent and not stalled.ended and not self._fleet.is_stopping:
            stalled.kill(reason="stalled")

    # -- due ------------------------------------------------------------------------------------------

    def _recycle_if_due(self, slot: Slot, generation: Generation) -> None:
        reason = why_recycle(self._fleet.config.recycle, generation, self._age_factor(generation))
        if not reason or now() < self._not_before.get(slot.number, 0.0):
            return
        self._not_before[slot.number] = now() + RECYCLE_AGAIN_AFTER
        self._operations.recycle(slot.number, reason)

    def _age_factor(self, generation: Generation) -> float:
        """Spread the ages of workers that were started together; the same each time for one worker."""
        seed = f"{generation.slot}:{generation.number}:{generation.ready_at}"
        return 1 - AGE_JITTER * random.Random(seed).random()


def _owes_beats(generation: Generation) -> bool:
    is_told_of = generation.reports.beat is not None and not generation.is_cut_off
    return is_told_of and generation.state in BEATS_IN


def why_recycle(limits: Recycle, generation: Generation, age_factor: float = 1.0) -> str:
    """Return which limit a worker has reached, or nothing."""
    if generation.ready_at is None or generation.reports.beat is None:
        return ""
    if limits.max_age and now() - generation.ready_at >= limits.max_age * age_factor:
        return f"recycle: older than {limits.max_age:g} s"
    if limits.max_jobs and generation.reports.jobs_started >= limits.max_jobs:
        return f"recycle: {counted(generation.reports.jobs_started, 'job')}"
    # Private memory: resident memory has the pages of the image, and PSS grows when another worker ends.
    private = generation.private_bytes or 0
    if limits.max_rss_mb and private >= limits.max_rss_mb * 1_000_000:
        return f"recycle: {private // 1_000_000} MB"
    return ""
