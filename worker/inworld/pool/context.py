"""One context on its way through the pool, from the wait for a place to its end: a pure state machine.

Each method is told what happened and the time, changes the state, and returns effects: what the pool has to
do, in order. A context has no clock, no task and no reference to the pool or to a connection. No method can
therefore be interrupted, and a test can drive a context without a network.

A context may outlive a connection. It keeps every frame until the server has said `contextCreated`. A create
that one connection does not answer is sent again on another, with all frames that followed. The owner of the
context does not notice.

The end for the owner and the end for the server may lie apart. A context that failed or was cancelled is over
for its owner at once. Its place stays taken until the server reports the end. A place that was given away
before would make the server refuse every later create on that connection. A context whose answer the server
owes for too long ends by `expire`, and its connection takes no new contexts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from lastcall.worker.inworld.pool import protocol
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
from lastcall.worker.inworld.pool.protocol import Action, Document, Frame, Kind
from lastcall.worker.inworld.pool.splitting import split
from lastcall.worker.inworld.pool.timer import NEVER
from lastcall.worker.inworld.pool.timings import Timings

# Bytes that one context may send before contextCreated. Ours: over an hour of speech, at 15 characters a
# second.
MAX_REPLAY_BYTES = 64 * 1024
# How often a create is sent again after no answer, and after a connection that was dead or full. Ours: once
# after no answer, because that wait has cost `Timings.create` seconds already. A dead or full connection
# costs no time, and several idle ones may have died.
MAX_RETRIES_UNANSWERED = 1
MAX_RETRIES_LOST = 3

S, E = ContextState, ContextEvent


class Listener(Protocol):
    """The owner's side of a context. Neither method may wait or fail."""

    def on_frame(self, frame: Frame, context: Context) -> None:
        """Take a frame: every frame but an error and the end."""

    def on_end(self, error: InworldError | None, frame: Frame | None, context: Context) -> None:
        """Take the end, once: None is contextClosed, and `frame` the last frame if there was one."""


# -- effects: what the pool has to do -----------------------------------------------------------------------
#
# Nobody changes an effect. They are not frozen, because a frozen dataclass takes twice as long to make, and a
# context makes eight of them.


@dataclass(slots=True)
class Send:
    """Send a frame on the context's connection."""

    text: str


@dataclass(slots=True)
class Watch:
    """Look at the context's deadline again at this time, and call `expire` if the deadline is over."""

    at: float


@dataclass(slots=True)
class Answered:
    """Note that the server answered the create after so many seconds."""

    seconds: float


@dataclass(slots=True)
class Slow:
    """Call `try_elsewhere` if another connection may answer sooner: the create is slow."""


@dataclass(slots=True)
class Deliver:
    """Give a frame to the listener."""

    frame: Frame


@dataclass(slots=True)
class Tell:
    """Tell the listener the end."""

    error: InworldError | None
    frame: Frame | None


@dataclass(slots=True)
class Retire:
    """Put no new context on the context's connection."""


@dataclass(slots=True)
class Retry:
    """Request a place again, before all others.

    `remainder` is what the first try leaves at the server: it takes the place over, and is to be cancelled.
    """

    remainder: Context | None


@dataclass(slots=True)
class End:
    """Release the context's claim. The fate is closed where the server agreed or never knew the context."""

    fate: Literal["closed", "forced"]


Effect = Send | Watch | Answered | Slow | Deliver | Tell | Retire | Retry | End
Effects = list[Effect]


class Context:
    """One context. `id` is the server's name for it, drawn anew for each connection.

    `sent_at`: when the create was sent.
    `deadline`: when the connection has to call `expire`. `acquire_at`: by when the context has to exist.
    `is_told`: the listener knows the end, or there is no listener. `unanswered_cancels`: requests to stop
    that the server has answered neither by the end nor by an error.
    """

    __slots__ = (
        "_cancel_until",
        "_config",
        "_create_until",
        "_has_hinted",
        "_replay",
        "_replay_bytes",
        "_retries",
        "_timings",
        "acquire_at",
        "deadline",
        "id",
        "is_created",
        "is_told",
        "listener",
        "sent_at",
        "state",
        "unanswered_cancels",
    )

    def __init__(
        self, config: Document, listener: Listener | None, *, timings: Timings, acquire_at: float
    ) -> None:
        self.id = ""
        self.state = S.WAITING
        self.is_created = False
        self.is_told = listener is None
        self.listener = listener
        self.acquire_at = acquire_at
        self.deadline = NEVER
        self.unanswered_cancels = 0
        self.sent_at = NEVER
        self._create_until = NEVER
        self._config = config
        self._timings = timings
        self._cancel_until = NEVER
        self._has_hinted = False
        # Frames that are sent again with the create, until the server has said contextCreated.
        self._replay: list[tuple[Action, Document]] = []
        self._replay_bytes = 0
        self._retries = 0

    # -- what the owner asks ------------------------------------------------------------------------------

    def send(self, action: Action, document: Document, at: float) -> Effects:
        """Pass a frame on, in order; before the context exists the frame is kept."""
        if action is Action.CANCEL:
            return self.cancel(at)
        if action is Action.CLOSE:
            return self.close(at)
        if action is Action.TEXT:
            return [effect for piece in _pieces(document) for effect in self._send(action, piece, at)]
        return self._send(action, document, at)

    def close(self, at: float) -> Effects:
        """Have the server finish what it has and close. A second close of a waiting context is a cancel."""
        if self.state is S.WAITING and any(action is Action.CLOSE for action, _ in self._replay):
            return self.cancel(at)
        if self.state in (S.WAITING, S.CREATING, S.OPEN):
            return self._send(Action.CLOSE, protocol.close(), at)
        return []

    def cancel(self, at: float) -> Effects:
        """Stop at once. A waiting context ends now, any other when the server says so."""
        if self.state is S.WAITING:
            return self._end(ContextCancelled("cancelled while waiting for capacity"), "closed")
        if self.state in (S.CREATING, S.OPEN, S.CLOSING):
            return self._cancel(at)
        return []

    def fail(self, error: InworldError, at: float) -> Effects:
        """Be over for the owner now, with this error, and cancelled at the server."""
        if self.state is S.WAITING:
            return self._end(error, "closed")
        return [*self._tell(error, None), *self.cancel(at)]

    def _send(self, action: Action, document: Document, at: float) -> Effects:
        if self.state not in (S.WAITING, S.CREATING, S.OPEN):
            return []  # the owner has closed or cancelled before: nothing can follow
        if not self.is_created:
            self._replay.append((action, document))
            self._replay_bytes += len(str(document))
            if self._replay_bytes > MAX_REPLAY_BYTES:
                what = f"{self._replay_bytes} bytes were sent before the context existed"
                return self.fail(Overflow(f"{what}, at most {MAX_REPLAY_BYTES} are kept"), at)
        return [] if self.state is S.WAITING else self._put(action, document, at)

    def _put(self, action: Action, document: Document, at: float) -> Effects:
        effects: Effects = [Send(protocol.encode(document, self.id))]
        if action is Action.CLOSE:
            self._move(E.CLOSE)
            if self.is_created:
                effects += self._wait_until(at + self._timings.silence)
        return effects

    def _cancel(self, at: float) -> Effects:
        effects = self._put(Action.CANCEL, protocol.cancel(), at)
        self._move(E.CANCEL)
        self.unanswered_cancels += 1
        self._cancel_until = at + self._timings.cancel
        return [*effects, *self._wait_until(min(self._cancel_until, at + self._timings.cancel_hint))]

    # -- what happens -------------------------------------------------------------------------------------

    def granted(self, id: str, at: float, slow_after: float = NEVER) -> Effects:
        """Send the create, and all that was kept, under an id that is new to the connection.

        A first create that is not answered for `slow_after` seconds is reported as slow, once.
        """
        self.id = id
        self.sent_at = at
        self._create_until = min(self.acquire_at, at + self._timings.create)
        self._move(E.GRANT)
        effects: Effects = [Send(protocol.encode(protocol.create(self._config), id))]
        for action, document in self._replay:
            effects += self._put(action, document, at)
        slow_at = NEVER if self._retries else at + slow_after
        return [*effects, *self._wait_until(min(self._create_until, slow_at))]

    def take(self, frame: Frame, at: float) -> Effects:
        """Take one frame of the server's that is addressed to this context."""
        if frame.kind is Kind.CLOSED:
            return self._end(None, "closed", frame)
        if frame.kind is Kind.STATUS:
            return self._take_error(frame, at)
        effects: Effects = []
        if not self.is_created:
            effects += self._created(at)
        elif self.state is S.CLOSING:
            # Later than before: the timer fires at the old deadline, and finds the new one.
            self.deadline = at + self._timings.silence
        if not self.is_told and self.state is not S.CANCELLING:
            effects.append(Deliver(frame))
        return effects

    def _created(self, at: float) -> Effects:
        self.is_created = True
        self._replay.clear()
        answered = Answered(at - self.sent_at)
        if self.state is S.CANCELLING:
            return [answered]
        self._move(E.CREATED)
        return [
            answered,
            *self._wait_until(at + self._timings.silence if self.state is S.CLOSING else NEVER),
        ]

    def _take_error(self, frame: Frame, at: float) -> Effects:
        error = ContextError(frame.message or f"the server's error {frame.code}", code=frame.code)
        is_unknown = frame.code == NOT_FOUND or "not found" in frame.message.lower()
        if self.state is S.CANCELLING:
            # The error answers the cancel, or a frame before the cancel. Only "not found" is an end.
            return self._end(error, "closed", frame) if is_unknown else self._refused_cancel(at)
        if not self.is_created and "max contexts" in frame.message.lower():
            # The server counts more contexts on this connection than the pool does, so it takes no create.
            return self._retry_elsewhere(error, MAX_RETRIES_LOST, at)
        if not self.is_created or is_unknown:
            return self._end(error, "closed", frame)  # a create that failed leaves no context
        # No published text says whether a context outlives its error, so it is cancelled and its place kept.
        return [*self._tell(error, frame), *self._cancel(at)]

    def take_nameless(self, frame: Frame, at: float) -> Effects:
        """Take an error of the server's that names no context, and that is most likely for this one."""
        if self.state is S.CANCELLING:
            return self._refused_cancel(at)
        return self.fail(
            ContextError(frame.message or f"the server's error {frame.code}", code=frame.code), at
        )

    def expire(self, at: float) -> Effects:
        """Give up waiting for the answer that the deadline was for."""
        timings = self._timings
        if self.state is S.WAITING:
            return self.fail(AcquireTimeout("no capacity came free in time; try again"), at)
        if self.state is S.CANCELLING:
            if at < self._cancel_until:
                return self.hint(at)
            return self._give_up(Silent(f"cancel_context was not answered within {timings.cancel:g} s"))
        if self.is_created:
            silent = Silent(f"a closed context said nothing for {timings.silence:g} s")
            return [*self._put(Action.CANCEL, protocol.cancel(), at), *self._give_up(silent)]
        if at < self._create_until:
            return [*self._wait_until(self._create_until), Slow()]
        if at >= self.acquire_at:
            return self.fail(AcquireTimeout("the server did not create the context in time; try again"), at)
        error = AcquireTimeout(f"create was not answered within {timings.create:g} s; try again")
        return self._retry_elsewhere(error, MAX_RETRIES_UNANSWERED, at)

    @property
    def may_try_elsewhere(self) -> bool:
        """Whether this is the first try of a create that is neither answered nor cancelled."""
        return not self.is_created and not self._retries and self.state in (S.CREATING, S.CLOSING)

    def try_elsewhere(self, at: float) -> Effects:
        """Send the create once more on another connection."""
        if not self.may_try_elsewhere:
            return []
        return self._retry_elsewhere(AcquireTimeout("create is slow"), MAX_RETRIES_UNANSWERED, at)

    def lose(self, error: ConnectionLost) -> Effects:
        """Note that the connection has gone."""
        if self.is_created or self.state is S.CANCELLING or self._retries >= MAX_RETRIES_LOST:
            return self._end(error, "forced")
        return self._retry(None)

    def hint(self, at: float) -> Effects:
        """Ask for the end once more, by close_context: a server without cancel_context knows that."""
        if self._has_hinted:
            return []
        self._has_hinted = True
        self.unanswered_cancels += 1
        return [
            Send(protocol.encode(protocol.close(), self.id)),
            *self._wait_until(max(at, self._cancel_until)),
        ]

    def _refused_cancel(self, at: float) -> Effects:
        self.unanswered_cancels = max(0, self.unanswered_cancels - 1)
        return self.hint(at)

    # -- another connection -------------------------------------------------------------------------------

    def _retry_elsewhere(self, error: InworldError, most: int, at: float) -> Effects:
        if self._retries >= most:
            return [Retire(), *self.fail(error, at)]
        # The first try may yet succeed, unseen: what is left of it has its place, and is to be cancelled.
        remainder = Context({}, None, timings=self._timings, acquire_at=NEVER)
        remainder.id, remainder.state, remainder.sent_at = self.id, self.state, self.sent_at
        return [Retire(), *self._retry(remainder)]

    def _retry(self, remainder: Context | None) -> Effects:
        self._move(E.RETRY)
        self.deadline = NEVER
        self._retries += 1
        return [Retry(remainder)]

    # -- ends ---------------------------------------------------------------------------------------------

    def _give_up(self, error: InworldError) -> Effects:
        return [Retire(), *self._end(error, "forced")]

    def _end(
        self, error: InworldError | None, fate: Literal["closed", "forced"], frame: Frame | None = None
    ) -> Effects:
        if self.state is S.CANCELLING:
            error, frame = ContextCancelled("cancelled"), None
        self._move(E.END)
        self.deadline = NEVER
        self._replay.clear()
        return [End(fate), *self._tell(error, frame)]

    def _tell(self, error: InworldError | None, frame: Frame | None) -> Effects:
        if self.is_told:
            return []
        self.is_told = True
        return [Tell(error, frame)]

    def _wait_until(self, at: float) -> Effects:
        self.deadline = at
        return [Watch(at)] if at < NEVER else []

    def _move(self, event: ContextEvent) -> None:
        """Change the state, as the table has it."""
        self.state = CONTEXT_TABLE[self.state, event]


def _pieces(document: Document) -> list[Document]:
    """Cut a send_text that the server would refuse; a flush in it stays with the last piece."""
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
