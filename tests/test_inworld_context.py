"""A context alone: whatever happens in whatever order, its effects keep the rules that the pool relies on."""

from __future__ import annotations

import json
from typing import assert_never

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lastcall.worker.inworld.pool import protocol
from lastcall.worker.inworld.pool.context import (
    Answered,
    Context,
    Deliver,
    Effects,
    End,
    Retire,
    Retry,
    Send,
    Slow,
    Tell,
    Watch,
)
from lastcall.worker.inworld.pool.errors import (
    NOT_FOUND,
    ConnectionLost,
    ContextCancelled,
    ContextError,
    InworldError,
)
from lastcall.worker.inworld.pool.lifecycles import ContextState
from lastcall.worker.inworld.pool.protocol import Action, Frame, Kind
from lastcall.worker.inworld.pool.timings import Timings

ON_A_CONNECTION = {
    ContextState.CREATING,
    ContextState.OPEN,
    ContextState.CLOSING,
    ContextState.CANCELLING,
}


class Nobody:
    """A listener that is never called: the pool calls listeners, and there is no pool here."""

    def on_frame(self, frame: Frame, context: Context) -> None:
        raise AssertionError

    def on_end(self, error: InworldError | None, frame: Frame | None, context: Context) -> None:
        raise AssertionError


def frame(kind: Kind, **fields: object) -> Frame:
    return Frame(kind=kind, context="id", text="{}", **fields)  # type: ignore[arg-type]  # of one of its types


FRAMES = [
    frame(Kind.CREATED),
    frame(Kind.AUDIO),
    frame(Kind.FLUSHED),
    frame(Kind.CLOSED),
    frame(Kind.STATUS, code=3, message="synthesis failed"),
    frame(Kind.STATUS, code=NOT_FOUND, message="Context id not found"),
    frame(Kind.STATUS, code=8, message="Max contexts limit reached"),
]
REQUESTS = [
    (Action.TEXT, protocol.send_text("Hello.")),
    (Action.TEXT, protocol.send_text("word " * 500)),
    (Action.FLUSH, protocol.flush()),
    (Action.CLOSE, protocol.close()),
    (Action.CANCEL, protocol.cancel()),
]
STEPS = st.one_of(
    st.tuples(st.just("send"), st.sampled_from(REQUESTS)),
    st.tuples(st.just("take"), st.sampled_from(FRAMES)),
    st.tuples(st.sampled_from(["close", "cancel", "fail", "granted", "expire", "lose"]), st.none()),
)


class Walk:
    """Does what a pool may do with a context, and checks each effect."""

    def __init__(self) -> None:
        self.context = Context({}, Nobody(), timings=Timings(), acquire_at=20.0)
        self.at = 0.0
        self.told = 0
        self.ended = 0
        self.creates = 0

    def step(self, name: str, value: object) -> None:
        context = self.context
        before = context.state
        is_on_connection = before in ON_A_CONNECTION
        match name:
            case "send":
                assert isinstance(value, tuple)
                action, document = value
                effects = context.send(action, document, self.at)
            case "take" if is_on_connection:
                assert isinstance(value, Frame)
                effects = context.take(value, self.at)
            case "close":
                effects = context.close(self.at)
            case "cancel":
                effects = context.cancel(self.at)
            case "fail":
                effects = context.fail(ContextError("no", code=3), self.at)
            case "granted" if before is ContextState.WAITING:
                self.creates += 1
                effects = context.granted(f"lc-{self.creates}", self.at, 1.0)
            case "expire" if context.deadline <= self.at or before is ContextState.WAITING:
                effects = context.expire(self.at)
            case "lose" if is_on_connection:
                effects = context.lose(ConnectionLost("gone"))
            case _:
                return
        self.check(effects)

    def check(self, effects: Effects) -> None:
        for effect in effects:
            assert not self.ended or isinstance(effect, Tell), "only the word to the listener follows the end"
            match effect:
                case Send(text):
                    assert json.loads(text)["contextId"] == self.context.id != ""
                case Watch(at):
                    assert at >= self.at
                case Answered(seconds):
                    assert seconds >= 0
                case Slow():
                    self.check(self.context.try_elsewhere(self.at))
                case Deliver():
                    assert not self.told
                case Tell(error, _):
                    self.told += 1
                    assert self.told == 1, "the listener was told twice"
                    assert error is None or isinstance(error, InworldError)
                case Retire():
                    pass
                case Retry(remainder):
                    assert self.context.state is ContextState.WAITING
                    if remainder is not None:
                        assert remainder.is_told and remainder.id == self.context.id
                        kinds = {type(each) for each in remainder.cancel(self.at)}
                        assert kinds == {Send, Watch}
                case End():
                    self.ended += 1
                case _:
                    assert_never(effect)
        assert bool(self.ended) is (self.context.state is ContextState.ENDED)
        assert not self.ended or self.told, "a context ended, and its listener was not told"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(STEPS, st.floats(0, 3)), max_size=25))
# An error that comes after the deadline of a cancel, before anything has looked at the deadline.
@example([(("granted", None), 0.0), (("cancel", None), 0.0), (("take", FRAMES[4]), 11.0)])
def test_any_order_of_events_keeps_the_rules(steps: list[tuple[tuple[str, object], float]]) -> None:
    """No order is an error. The end is told once, and nothing is sent or delivered after the end."""
    walk = Walk()
    for (name, value), pause in steps:
        walk.at += pause
        walk.step(name, value)
    assert walk.creates <= 4


def test_a_create_is_sent_again_with_all_that_followed() -> None:
    """Lost before contextCreated, the context sends its create, text, flush and close under the new id."""
    walk = Walk()
    context = walk.context
    for action, document in (REQUESTS[0], REQUESTS[2], REQUESTS[3]):
        assert context.send(action, document, 0.0) == []
    first = [each.text for each in context.granted("lc-1", 0.0) if isinstance(each, Send)]
    assert context.lose(ConnectionLost("gone")) == [Retry(None)]
    second = [each.text for each in context.granted("lc-2", 1.0) if isinstance(each, Send)]
    assert [text.replace("lc-1", "lc-2") for text in first] == second
    keys = [next(iter(json.loads(text))) for text in second]
    assert keys == ["create", "send_text", "flush_context", "close_context"]


def test_a_cancelled_context_is_over_for_its_owner_when_the_server_says_so() -> None:
    """The cancel is sent at once; the listener is told at contextClosed, and no audio comes before that."""
    context = Walk().context
    context.granted("lc-1", 0.0)
    context.take(frame(Kind.CREATED), 0.1)
    sent = context.cancel(0.2)
    assert isinstance(sent[0], Send) and "cancel_context" in json.loads(sent[0].text)
    assert context.take(frame(Kind.AUDIO), 0.3) == []
    end, tell = context.take(frame(Kind.CLOSED), 0.4)
    assert end == End("closed")
    assert isinstance(tell, Tell) and isinstance(tell.error, ContextCancelled)


def test_each_request_to_stop_takes_one_nameless_error() -> None:
    """The cancel and the close that follows it may each be refused once; later errors are for others."""
    context = Walk().context
    context.granted("lc-1", 0.0)
    context.take(frame(Kind.CREATED), 0.1)
    context.cancel(1.0)
    seen = []
    for at in (1.1, 1.2, 1.3):
        seen.append(context.unanswered_cancels)
        context.take_nameless(frame(Kind.ERROR, code=3, message="unknown payload"), at)
    assert seen == [1, 1, 0]
