"""When an idle connection is pinged, and what a missing pong means. Pure.

A firewall forgets a connection without traffic and tells neither side. Pings keep an idle connection known,
and find a forgotten one before a call does. No ping goes out while a context is on the connection, and a
missing pong means nothing then: audio is the better sign. A server that has never answered a ping on this
connection does not answer pings at all, so one ping is enough to learn that.
"""

from __future__ import annotations

import enum

from lastcall.worker.inworld.pool.timer import NEVER


class Verdict(enum.Enum):
    """The action for an idle connection now."""

    WAIT = "wait"
    PING = "ping"
    DEAD = "dead"


class Pinging:
    """The pings of one connection: `interval` seconds apart, each answered within `patience` seconds."""

    __slots__ = ("_has_answered", "_interval", "_patience", "_sent_at", "due")

    def __init__(self, interval: float, patience: float) -> None:
        # When to look next while the connection is idle.
        self.due = NEVER
        self._interval = interval
        self._patience = patience
        self._sent_at = NEVER
        self._has_answered = False

    @property
    def _is_over(self) -> bool:
        return self._sent_at < NEVER and not self._has_answered

    def idle(self, at: float) -> None:
        """Note that the connection became idle."""
        if self._is_over:  # the first ping was not answered
            self.due = NEVER
            return
        self._sent_at = NEVER
        self.due = at + self._interval

    def pong(self, at: float) -> None:
        """Note an answer."""
        self._has_answered = True
        self._sent_at = NEVER
        self.due = at + self._interval

    def look(self, at: float) -> Verdict:
        """Decide about an idle connection; `due` is when to look again."""
        if at < self.due:
            return Verdict.WAIT
        if self._sent_at == NEVER:
            self._sent_at, self.due = at, at + self._patience
            return Verdict.PING
        self.due = NEVER
        return Verdict.DEAD if self._has_answered else Verdict.WAIT
