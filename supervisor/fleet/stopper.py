"""The stop of one generation, done: a loop that does as `stop_steps.step` says, and asks again."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import replace
from typing import assert_never

from lastcall.supervisor.fleet.generation import Generation
from lastcall.supervisor.fleet.states import SlotEvent as E
from lastcall.supervisor.fleet.stop_steps import Action, Ending, Seen, Step, step
from lastcall.worker.base.budget import Deadlines
from lastcall.worker.base.clock import now
from lastcall.worker.base.wire import Drain, Fence, StopCause, Terminate


def fence(generations: Iterable[Generation], message: Fence) -> None:
    """Tell the workers to accept nothing more, and note it only when the last one has been told."""
    told = []
    for generation in generations:
        if generation.is_connected and generation.stopping.progress.fence_said_at is None:
            generation.say(message)
            told.append(generation.stopping)
    said_at = now()
    for stopping in told:
        stopping.progress = replace(stopping.progress, fence_said_at=said_at)


def begin(generation: Generation, ending: Ending) -> None:
    """Give a generation one more reason to stop, and tell its worker at once to accept nothing more.

    `stop` does the rest, some milliseconds later, when other workers have been told as well.
    """
    stopping = generation.stopping
    if ending not in stopping.endings:
        stopping.endings.append(ending)
    fence([generation], Fence(reason=stopping.reason, cause=stopping.cause))
    generation.changed.notify()


async def stop(generation: Generation, ending: Ending) -> None:
    """Stop a generation, or join the stop that is under way with the deadlines of one more ending.

    Returns when the program has exited, or can't be ended in time.
    """
    begin(generation, ending)
    stopping = generation.stopping
    if stopping.is_under_way:
        await generation.changed.until(lambda: generation.has_exited, lambda: stopping.deadlines.kill_at)
        return
    stopping.is_under_way = True
    try:
        while (following := _next(generation)).action is not Action.OVER:
            if following.action is Action.WAIT:
                await generation.changed.until(
                    lambda: _next(generation).action is not Action.WAIT, lambda: _next(generation).due_at
                )
            else:
                stopping.progress = following.progress
                _do(generation, following.action)
    finally:
        stopping.is_under_way = False


def _next(generation: Generation) -> Step:
    stopping = generation.stopping
    return step(_see(generation), stopping.progress, stopping.deadlines, now())


def _see(generation: Generation) -> Seen:
    reports = generation.reports
    return Seen(
        state=generation.state,
        is_opaque=generation.is_opaque,
        is_connected=generation.is_connected,
        has_exited=generation.has_exited,
        was_ready=generation.was_ready,
        is_silent=generation.is_silent,
        has_jobs=not generation.is_silent or generation.has_living_jobs(),
        fenced_at=reports.fenced_at,
        is_drained=reports.is_drained,
    )


def _do(generation: Generation, action: Action) -> None:
    stopping = generation.stopping
    deadlines = stopping.deadlines
    match action:
        case Action.ENTER:
            generation.change(E.FENCE, reason=stopping.reason)
        case Action.SIGTERM:
            generation.send(signal.SIGTERM)
        case Action.FENCE:
            generation.say(Fence(reason=stopping.reason, cause=stopping.cause))
        case Action.DRAIN:
            generation.say(_drain(deadlines, stopping.cause))
        case Action.NOTE_FENCED | Action.NOTE_UNFENCED:
            _note_fence(generation)
        case Action.HURRY:
            if generation.is_cut_off:
                generation.note_cut()
            generation.say(_drain(deadlines.hurried(now()), stopping.cause))
        case Action.CLOSE:
            generation.change(E.CLOSE)
        case Action.TERMINATE:
            generation.change(E.TERMINATE)
            # Not only with the kill: the worker ends its jobs at once, and may be killed before it tells.
            generation.note_cut()
            generation.say(Terminate())
        case Action.KILL:
            generation.kill()
        case Action.WAIT | Action.OVER:
            raise AssertionError(f"{action.name} is the loop's")
        case _:
            assert_never(action)


def _drain(deadlines: Deadlines, cause: StopCause) -> Drain:
    return Drain(drain_at=deadlines.drain_at, close_at=deadlines.close_at, cause=cause)


def _note_fence(generation: Generation) -> None:
    """Note how long the acknowledgement of the fence took, or that there was none in time."""
    said_at = generation.stopping.progress.fence_said_at
    fenced_at = generation.reports.fenced_at
    shared = generation.shared
    assert said_at is not None
    if fenced_at is not None:
        # A worker that was signalled itself has fenced before it was told to.
        shared.fence_seconds.observe(max(0.0, fenced_at - said_at))
    else:
        generation.log.warning("fence not acknowledged", after=round(now() - said_at, 3))
        if shared.is_stopping:
            shared.record.unacknowledged.append(generation.slot)
    shared.on_change()
