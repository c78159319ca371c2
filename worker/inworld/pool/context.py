"""One utterance stream on its way through the pool: from waiting for a place to `contextClosed`.

It may outlive a connection: a create that a connection does not answer is tried on another, and whoever asked
for the context does not notice, because all that was sent is kept until the server has said `contextCreated`.

What the owner sees and what the server counts may end at different times. A stream that failed or was
cancelled is over for its owner at once, but its place stays taken until the server says so: forgetting it
here would have every later create refused there. What the server owes an answer for too long ends by
`expire`, and its connection takes no new contexts.

Nothing here awaits. Every method is called between two turns of the loop and leaves all owners consistent.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Literal, Protocol

from lastcall.worker.base.clock import now
from lastcall.worker.inworld.pool import protocol
from lastcall.worker.inworld.pool.alarm import NEVER
from lastcall.worker.inworld.pool.errors import (
    NOT_FOUND,
    AcquireTimeout,
    ConnectionLost,
    ContextCancelled,
    ContextError,
    InworldError,
    Overflow,
    Silent,
)
from lastcall.worker.inworld.pool.lifecycles import CONTEXT_TABLE, ContextEvent, ContextState
from lastcall.worker.inworld.pool.places import Line, Ticket
from lastcall.worker.inworld.pool.protocol import Action, Document, Frame, Kind
from lastcall.worker.inworld.pool.splitting import split
from lastcall.worker.inworld.pool.timings import Timings

# Of what is sent before contextCreated, for each context.
MAX_KEPT = 64 * 1024
# How often a create is tried again: when it was not answered, and when its connection turned out to be dead
# or full. Idle connections that have died are found out only by use, and one may follow another.
UNANSWERED_RETRIES = 1
LOST_RETRIES = 3
SPENT = Ticket(lambda _: None)

Fate = Literal["closed", "forced"]
S, E = ContextState, ContextEvent


class Sink(Protocol):
    """Who a context is for. Neither method may wait or fail."""

    def on_frame(self, frame: Frame, context: Context) -> None:
        """Take a frame: anything but an error and the end."""

    def on_end(self, error: InworldError | None, frame: Frame | None, context: Context) -> None:
        """Take the end, once: None is contextClosed, and `frame` the last one if there was one."""


class Carrier(Protocol):
    """What a context asks of the connection that it is on."""

    line: Line
    contexts: dict[str, Context]

    def put(self, text: str) -> None: ...
    async def room(self) -> None: ...
    def watch(self, at: float) -> None: ...
    def rest(self) -> None: ...


class Owner(Protocol):
    """What a context asks of its pool."""

    timings: Timings

    def enter(self, ticket: Ticket, *, first: bool) -> None: ...
    def free(self, ticket: Ticket) -> None: ...
    def keep(self, ticket: Ticket) -> Carrier: ...
    def retire(self, line: Line) -> None: ...
    def granted(self, context: Context) -> None: ...
    def retried(self, context: Context) -> None: ...
    def adopted(self) -> None: ...
    def ended(self, context: Context, fate: Fate, *, had_place: bool) -> None: ...


class Context:
    """One context. `id` is what the server knows it by, drawn anew for each connection it is tried on."""

    __slots__ = (
        "_acquire_at",
        "_config",
        "_expire_at",
        "_hinted",
        "_kept",
        "_kept_bytes",
        "_owner",
        "_retries",
        "_sink",
        "_ticket",
        "_timer",
        "connection",
        "deadline",
        "id",
        "is_created",
        "is_told",
        "state",
    )

    def __init__(self, owner: Owner, config: Document, sink: Sink | None, acquire_at: float) -> None:
        self.id = ""
        self.state = S.WAITING
        self.is_created = False
        self.is_told = sink is None
        self.connection: Carrier | None = None
        # When the connection is to call `expire`.
        self.deadline = NEVER
        self._owner = owner
        self._config = config
        self._sink = sink
        self._acquire_at = acquire_at
        self._expire_at = NEVER
        self._hinted = False
        self._kept: list[tuple[Action, Document]] = []
        self._kept_bytes = 0
        self._retries = 0
        self._ticket = Ticket(self._granted)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Ask for a place; it may be there before this returns."""
        self._enter(first=False)

    # -- what its owner asks ------------------------------------------------------------------------------

    def send(self, action: Action, document: Document) -> None:
        """Pass a frame on, in order; before the context exists it is kept for when it does."""
        if action is Action.CANCEL:
            self.cancel()
        elif action is Action.CLOSE:
            self.close()
        elif action is Action.TEXT:
            for piece in _pieces(document):
                self._send(action, piece)
        else:
            self._send(action, document)

    def close(self) -> None:
        """Have the server finish what it has and close. A second time, while it still waits, is a cancel."""
        if self.state is S.WAITING and any(action is Action.CLOSE for action, _ in self._kept):
            self.cancel()
        elif self.state in (S.WAITING, S.CREATING, S.OPEN):
            self._send(Action.CLOSE, protocol.close())

    def cancel(self) -> None:
        """Stop at once. Without a place yet this is the end, else the end is when the server says so."""
        if self.state is S.WAITING:
            self._end(ContextCancelled("cancelled while waiting for capacity"), "closed")
        elif self.state in (S.CREATING, S.OPEN, S.CLOSING):
            self._cancel()

    def fail(self, error: InworldError) -> None:
        """Be over for its owner now, with this error, and cancelled at the server."""
        if self.state is S.WAITING:
            self._end(error, "closed")
        else:
            self._tell(error, None)
            self.cancel()

    def _send(self, action: Action, document: Document) -> None:
        if self.state not in (S.WAITING, S.CREATING, S.OPEN):
            return  # closed or cancelled by its owner before: nothing can follow
        if not self.is_created:
            self._kept.append((action, document))
            self._kept_bytes += len(str(document))
            if self._kept_bytes > MAX_KEPT:
                what = f"{self._kept_bytes} bytes were sent before the context existed"
                self.fail(Overflow(f"{what}, at most {MAX_KEPT} are kept"))
                return
        if self.state is not S.WAITING:
            self._put(action, document)

    def _put(self, action: Action, document: Document) -> None:
        assert self.connection is not None
        self.connection.put(protocol.encode(document, self.id))
        if action is Action.CLOSE:
            self._move(E.CLOSE)
            if self.is_created:
                self._wait_until(now() + self._owner.timings.silence)

    def _cancel(self) -> None:
        self._put(Action.CANCEL, protocol.cancel())
        self._move(E.CANCEL)
        timings = self._owner.timings
        self._expire_at = now() + timings.cancel
        self._wait_until(min(self._expire_at, now() + timings.cancel_hint))

    # -- what happens to it -------------------------------------------------------------------------------

    def _granted(self, line: Line) -> None:
        self._stop_timer()
        self.connection = connection = self._owner.keep(self._ticket)
        # A hyphen is no letter of base64: the id can't stand in any audio.
        self.id = f"lc-{secrets.token_hex(8)}"
        connection.contexts[self.id] = self
        self._owner.granted(self)
        self._move(E.GRANT)
        connection.put(protocol.encode(protocol.create(self._config), self.id))
        for action, document in self._kept:
            self._put(action, document)
        self._wait_until(min(self._acquire_at, now() + self._owner.timings.create))

    def take(self, frame: Frame) -> None:
        """Take one frame of the server's that is addressed to this context."""
        if frame.kind is Kind.CLOSED:
            self._end(None, "closed", frame)
        elif frame.kind is Kind.STATUS:
            self._take_error(frame)
        else:
            if not self.is_created:
                self._created()
            elif self.state is S.CLOSING:
                self.deadline = now() + self._owner.timings.silence  # later than before: no new alarm
            if self._sink is not None and self.state is not S.CANCELLING:
                self._sink.on_frame(frame, self)

    def _created(self) -> None:
        self.is_created = True
        self._kept.clear()
        if self.state is S.CANCELLING:
            return
        self._move(E.CREATED)
        self._wait_until(now() + self._owner.timings.silence if self.state is S.CLOSING else NEVER)

    def _take_error(self, frame: Frame) -> None:
        error = ContextError(frame.message or f"the server's error {frame.code}", code=frame.code)
        is_unknown = frame.code == NOT_FOUND or "not found" in frame.message.lower()
        if self.state is S.CANCELLING:
            # The answer to a cancel, or to what was sent before it. Only "not found" says that it is over.
            if is_unknown:
                self._end(error, "closed", frame)
            else:
                self.hint()
        elif not self.is_created and "max contexts" in frame.message.lower():
            # It counts more contexts than we know of, so no create of ours is welcome there.
            self._retry_elsewhere(error, LOST_RETRIES)
        elif not self.is_created or is_unknown:
            self._end(error, "closed", frame)  # a create that failed leaves no context
        else:
            # Whether the context outlives its error is not known, so it is cancelled, and its place kept.
            self._tell(error, frame)
            self._cancel()

    def expire(self) -> None:
        """Give up waiting for what the deadline was for."""
        timings = self._owner.timings
        if self.state is S.WAITING:
            self._end(AcquireTimeout("no capacity came free in time; try again"), "closed")
        elif self.state is S.CANCELLING:
            if now() < self._expire_at:
                self.hint()
                return
            self._give_up(Silent(f"cancel_context was not answered within {timings.cancel:g} s"))
        elif self.is_created:
            self._put(Action.CANCEL, protocol.cancel())
            self._give_up(Silent(f"a closed context said nothing for {timings.silence:g} s"))
        elif now() >= self._acquire_at:
            self.fail(AcquireTimeout("the server did not create the context in time; try again"))
        else:
            error = AcquireTimeout(f"create was not answered within {timings.create:g} s; try again")
            self._retry_elsewhere(error, UNANSWERED_RETRIES)

    def lose(self, error: ConnectionLost) -> None:
        """Note that the connection has gone."""
        if self.is_created or self.state is S.CANCELLING or self._retries >= LOST_RETRIES:
            self._end(error, "forced")
        else:
            self._retry()

    # -- another connection ------------------------------------------------------------------------------

    def _retry_elsewhere(self, error: InworldError, most: int) -> None:
        connection, ticket = self.connection, self._ticket
        assert connection is not None
        self._owner.retire(connection.line)
        if self._retries >= most:
            self.fail(error)
            return
        # The first try may yet succeed, unseen. What is left of it holds its place and is cancelled.
        left = Context(self._owner, {}, None, NEVER)
        left.id, left.connection, left._ticket, left.state = self.id, connection, ticket, self.state
        connection.contexts[left.id] = left
        self._owner.adopted()
        self._ticket = Ticket(self._granted)
        left._cancel()
        self._retry()

    def _retry(self) -> None:
        self.connection, self.id = None, ""
        self._move(E.RETRY)
        self.deadline = NEVER
        self._retries += 1
        self._owner.retried(self)
        self._owner.free(self._ticket)
        self._ticket = Ticket(self._granted)
        self._enter(first=True)

    def _enter(self, *, first: bool) -> None:
        self._owner.enter(self._ticket, first=first)
        if self.state is S.WAITING:
            left = max(0.0, self._acquire_at - now())
            self._timer = asyncio.get_running_loop().call_later(left, self.expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- ends ---------------------------------------------------------------------------------------------

    def hint(self) -> None:
        """Ask for the end in the other way; a server that knows no cancel_context knows this."""
        if not self._hinted:
            self._hinted = True
            assert self.connection is not None
            self.connection.put(protocol.encode(protocol.close(), self.id))
            self._wait_until(self._expire_at)

    def _give_up(self, error: InworldError) -> None:
        assert self.connection is not None
        self._owner.retire(self.connection.line)
        self._end(error, "forced")

    def _end(self, error: InworldError | None, fate: Fate, frame: Frame | None = None) -> None:
        if self.state is S.CANCELLING:
            error, frame = ContextCancelled("cancelled"), None
        self._move(E.END)
        self._stop_timer()
        self.deadline = NEVER
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.contexts.pop(self.id, None)
        self._kept.clear()
        self._owner.free(self._ticket)
        self._ticket = SPENT  # it knows us: without the circle we are gone at once, not at some collection
        self._owner.ended(self, fate, had_place=connection is not None)
        if connection is not None:
            connection.rest()
        self._tell(error, frame)

    def _tell(self, error: InworldError | None, frame: Frame | None) -> None:
        self.is_told = True
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.on_end(error, frame, self)

    def _wait_until(self, at: float) -> None:
        self.deadline = at
        if at < NEVER:
            assert self.connection is not None
            self.connection.watch(at)

    def _move(self, event: ContextEvent) -> None:
        """Change the state, as the table has it."""
        self.state = CONTEXT_TABLE[self.state, event]


def _pieces(document: Document) -> list[Document]:
    """Cut a send_text that the server would refuse; what flushes stays with the last piece."""
    body = document.get("send_text")
    text = body.get("text") if isinstance(body, dict) else None
    if not isinstance(text, str) or body is None:
        return [document]
    pieces = split(text)
    if len(pieces) == 1:
        return [document]
    rest = {key: value for key, value in body.items() if key not in ("text", "flush_context")}
    documents: list[Document] = [{**document, "send_text": {**rest, "text": piece}} for piece in pieces[:-1]]
    return [*documents, {**document, "send_text": {**body, "text": pieces[-1]}}]
