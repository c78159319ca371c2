"""Who has which place on which connection: the pool's decisions, without I/O, clock or tasks.

A *line* is a connection as the rules see it, a *ticket* a context's claim to one of its places. Everything
here happens at once, between two awaits of whoever calls, so at each instant every place has one owner:

    places of an open line = free + pending (granted, create not yet sent) + held (the server may count it)

Waiters are served first come, first served, each by a call of its own, never by a shared event. Whatever
gives capacity back (a place freed, a line opened, a waiter gone) ends in `_serve`, the one function that
hands places on, so no path can forget to wake the next.

Waiters belong to no line until they are granted a place: a dial that hangs or fails holds nobody in
particular up, and when any place comes free, the one who waits longest has it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

from lastcall.worker.inworld.pool.lifecycles import LINE_TABLE, LineEvent, LineState


class Hold(enum.Enum):
    """What a ticket is worth."""

    NONE = "none"
    WAITING = "waiting"
    PENDING = "pending"
    HELD = "held"


class Line:
    """One connection's places. `is_slow`: its dial takes so long that another may be started beside it."""

    __slots__ = ("is_probe", "is_slow", "number", "state", "taken", "was_used")

    def __init__(self, number: int) -> None:
        self.number = number
        self.state = LineState.DIALLING
        self.taken = 0
        self.is_slow = False
        self.was_used = False
        # Dialled to take another line's place, not because somebody waits.
        self.is_probe = False

    def move(self, event: LineEvent) -> None:
        """Change the state, as the table has it."""
        self.state = LINE_TABLE[self.state, event]


class Ticket:
    """One claim. `grant` is called at the moment the place is given, and must not wait or fail."""

    __slots__ = ("grant", "hold", "line")

    def __init__(self, grant: Callable[[Line], None]) -> None:
        self.grant = grant
        self.hold = Hold.NONE
        self.line: Line | None = None


class Slots:
    """Lines, tickets and the queue between them."""

    def __init__(self, max_connections: int, max_contexts: int) -> None:
        self.max_connections = max_connections
        self.max_contexts = max_contexts
        self.lines: dict[Line, None] = {}
        self._waiting: dict[Ticket, None] = {}
        self._numbers = 0
        self._is_serving = False

    # -- what is -----------------------------------------------------------------------------------------

    @property
    def waiters(self) -> int:
        return len(self._waiting)

    @property
    def taken(self) -> int:
        return sum(line.taken for line in self.lines)

    @property
    def dialling(self) -> list[Line]:
        return [line for line in self.lines if line.state is LineState.DIALLING]

    @property
    def idle(self) -> list[Line]:
        """The open lines that nobody uses."""
        return [line for line in self.lines if line.state is LineState.OPEN and not line.taken]

    def wanted(self) -> int:
        """Return how many dials to start now, so that everybody who waits will have a place.

        A slow dial gets one beside it, but only one: a server that answers nobody is not to be flooded.
        """
        dials = self.dialling
        need = math.ceil(len(self._waiting) / self.max_contexts)
        slow = sum(line.is_slow for line in dials)
        room = self.max_connections - len(self.lines)
        return max(0, min(need + min(slow, need) - len(dials), room))

    # -- claims ------------------------------------------------------------------------------------------

    def enter(self, ticket: Ticket, *, first: bool = False) -> None:
        """Have a ticket wait for a place; it may be granted before this returns.

        `first` is for one that had a place and lost it by no fault of its own.
        """
        assert ticket.hold is Hold.NONE
        ticket.hold = Hold.WAITING
        self._waiting = {ticket: None, **self._waiting} if first else self._waiting
        self._waiting[ticket] = None
        self._serve()

    def keep(self, ticket: Ticket) -> None:
        """Note that the server may count the place from now on."""
        assert ticket.hold is Hold.PENDING and ticket.line is not None
        ticket.hold = Hold.HELD
        ticket.line.was_used = True

    def free(self, ticket: Ticket) -> None:
        """Give back whatever the ticket is worth: its place, or its turn. Nothing happens the second time."""
        hold, line = ticket.hold, ticket.line
        ticket.hold, ticket.line = Hold.NONE, None
        if hold is Hold.WAITING:
            del self._waiting[ticket]
        elif line is not None:
            line.taken -= 1
        self._serve()

    # -- lines -------------------------------------------------------------------------------------------

    def dial(self, *, is_probe: bool = False) -> Line:
        """Count one more connection, from before its first packet on."""
        assert len(self.lines) < self.max_connections
        self._numbers += 1
        line = Line(self._numbers)
        line.is_probe = is_probe
        self.lines[line] = None
        return line

    def opened(self, line: Line) -> None:
        line.move(LineEvent.CONNECT)
        self._serve()

    def retire(self, line: Line) -> None:
        """Put no new context on a line; those on it stay."""
        if line.state is LineState.OPEN:
            line.move(LineEvent.RETIRE)

    def close(self, line: Line) -> None:
        """Note that a line, or its dial, is being ended; it counts until it is gone."""
        if line.state is not LineState.CLOSING:
            line.move(LineEvent.CLOSE)

    def gone(self, line: Line) -> None:
        """Stop counting a line. Its tickets have been freed before, or are freed by their owners after."""
        del self.lines[line]
        line.move(LineEvent.END)
        self._serve()

    # -- the one function that hands places on -------------------------------------------------------------

    def _serve(self) -> None:
        if self._is_serving:  # a grant that ends its own ticket at once comes back here
            return
        self._is_serving = True
        try:
            while self._waiting and (line := self._best()) is not None:
                ticket = next(iter(self._waiting))
                del self._waiting[ticket]
                line.taken += 1
                ticket.hold, ticket.line = Hold.PENDING, line
                ticket.grant(line)
        finally:
            self._is_serving = False

    def _best(self) -> Line | None:
        """Return the fullest line with a free place: few full connections leave the others to go idle."""
        best: Line | None = None
        for line in self.lines:
            is_free = line.state is LineState.OPEN and line.taken < self.max_contexts
            if is_free and (best is None or line.taken > best.taken):
                best = line
        return best
