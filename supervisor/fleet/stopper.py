"""The loop that takes one generation through its stop: it does as `stop_steps.step` says, and asks again."""

from __future__ import annotations

import signal
from typing import assert_never

from lastcall.supervisor.fleet.generation import Generation
from lastcall.supervisor.fleet.states import SlotEvent as E
from lastcall.supervisor.fleet.stop_steps import KILLED_IN, Action, Ending, Step, step
from lastcall.worker.base.clock import now
from lastcall.worker.base.wire import Drain, Fence, Terminate


async def stop(generation: Generation, ending: Ending) -> None:
    """Stop a generation, or join the stop that is under way with the deadlines of one more ending.

    Returns when the program has exited, or can't be ended in time.
    """
    generation.begin_stop(ending)
    stopping = generation.stopping
    if stopping.is_under_way:
        await generation.changed.until(
            lambda: generation.has_exited, lambda: stopping.deadlines.terminate_at + KILLED_IN
        )
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
    return step(generation.seen(), stopping.progress, stopping.deadlines, now())


def _do(generation: Generation, action: Action) -> None:
    stopping = generation.stopping
    deadlines = stopping.deadlines
    match action:
        case Action.ENTER:
            generation.change(E.FENCE, reason=stopping.reason)
        case Action.SIGTERM:
            generation.send(signal.SIGTERM)
        case Action.FENCE:
            generation.say(Fence(reason=stopping.reason))
        case Action.DRAIN:
            generation.say(Drain(drain_at=deadlines.drain_at, close_at=deadlines.close_at))
        case Action.NOTE_FENCED:
            generation.note_fence(is_acknowledged=True)
        case Action.NOTE_UNFENCED:
            generation.note_fence(is_acknowledged=False)
        case Action.HURRY:
            hurried = deadlines.hurried(now())
            generation.say(Drain(drain_at=hurried.drain_at, close_at=hurried.close_at))
        case Action.CLOSE:
            generation.change(E.CLOSE)
        case Action.TERMINATE:
            generation.change(E.TERMINATE)
            generation.say(Terminate())
        case Action.KILL:
            generation.kill()
        case Action.WAIT | Action.OVER:
            raise AssertionError(f"{action.name} is the loop's")
        case _:
            assert_never(action)
