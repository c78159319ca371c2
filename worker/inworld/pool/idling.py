"""Which idle connections to close, and when to look again. Pure.

All are closed after their time but one: the last open connection is kept, so that the next context finds it
warm. The server closes a connection by itself after ten idle minutes, and may do so without our hearing of
it, so the warm one is replaced before: if it has been used since it was dialled. One that nobody has used for
that long is closed instead, and the pool goes cold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lastcall.worker.inworld.pool.alarm import NEVER
from lastcall.worker.inworld.pool.places import Line


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now. `replace` is closed by a later plan, when what replaces it is there."""

    close: tuple[Line, ...] = ()
    replace: Line | None = None
    look_at: float = NEVER


def plan(
    idle: Sequence[tuple[float, Line]],
    *,
    is_all: bool,
    at: float,
    timeout: float,
    warm: float,
    has_room: bool,
) -> Plan:
    """Judge the idle open lines, given with the time since when. `is_all`: no other line is open."""
    lines = sorted(idle, key=lambda each: each[0])
    last = lines.pop() if lines and is_all else None
    due = [(since + min(timeout, warm), line) for since, line in lines]
    close = [line for when, line in due if when <= at]
    look = [when for when, _ in due if when > at]
    replace = None
    if last is not None:
        since, line = last
        if since + warm > at:
            look.append(since + warm)
        elif line.was_used and has_room:
            replace = line
        else:
            close.append(line)
    return Plan(close=tuple(close), replace=replace, look_at=min(look, default=NEVER))
