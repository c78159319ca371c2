"""Decides which idle connections to close, and when to look again. Pure.

The pool closes every idle connection after its idle time, except the last open one. The last one stays open,
so that the next context needs no handshake. The server closes a connection that was idle for ten minutes, and
the pool may not notice. So the pool replaces the last connection after nine minutes, if a context has used
the connection and the limit leaves room for another. Otherwise the pool closes the connection, and the next
context has to wait for a handshake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lastcall.worker.inworld.pool.capacity import PoolEntry
from lastcall.worker.inworld.pool.timer import NEVER


@dataclass(frozen=True, slots=True, kw_only=True)
class IdlePlan:
    """The steps for now. A later plan closes `replace`, once its replacement is open."""

    close: tuple[PoolEntry, ...] = ()
    replace: PoolEntry | None = None
    look_at: float = NEVER


def plan(
    idle: Sequence[tuple[float, PoolEntry]],
    *,
    is_all: bool,
    at: float,
    timeout: float,
    warm: float,
    has_room: bool,
) -> IdlePlan:
    """Judge the idle open connections, each given with the time since when it is idle.

    `is_all`: no other connection is open. `timeout`: seconds after which an idle connection is closed.
    `warm`: seconds after which the last one is replaced. `has_room`: the account's limit leaves a connection.
    """
    entries = sorted(idle, key=lambda each: each[0])
    last = entries.pop() if entries and is_all else None
    due = [(since + min(timeout, warm), entry) for since, entry in entries]
    close = [entry for when, entry in due if when <= at]
    look = [when for when, _ in due if when > at]
    replace = None
    if last is not None:
        since, entry = last
        if since + warm > at:
            look.append(since + warm)
        elif entry.was_used and has_room:
            replace = entry
        else:
            close.append(entry)
    return IdlePlan(close=tuple(close), replace=replace, look_at=min(look, default=NEVER))
