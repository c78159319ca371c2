"""Frames, text pieces, delays and idle times: what is decided without I/O."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lastcall.worker.base.backoff import Backoff
from lastcall.worker.inworld.pool import idling, protocol
from lastcall.worker.inworld.pool.capacity import PoolEntry
from lastcall.worker.inworld.pool.errors import Malformed
from lastcall.worker.inworld.pool.lifecycles import (
    CONNECTION_TABLE,
    CONTEXT_TABLE,
    ConnectionState,
    ContextState,
)
from lastcall.worker.inworld.pool.protocol import Action, Kind
from lastcall.worker.inworld.pool.redialling import REDIAL_JITTER
from lastcall.worker.inworld.pool.splitting import split

# A busy machine is no failure.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
AUDIO = "UklGRg==" * 100


def result(**fields: object) -> str:
    return json.dumps({"result": {"contextId": "c1", **fields}})


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (result(contextCreated={}), Kind.CREATED),
        (result(contextUpdated={}), Kind.UPDATED),
        (result(flushCompleted={}), Kind.FLUSHED),
        (result(contextClosed={}), Kind.CLOSED),
        (result(status={"code": 0}, contextClosed={}), Kind.CLOSED),
        (result(status=None, contextClosed={}), Kind.CLOSED),
        (result(contextClosed={}, somethingNew=[1]), Kind.CLOSED),
        (result(somethingNew={}), Kind.OTHER),
        (result(status={"code": 5, "message": "Context c1 not found"}), Kind.STATUS),
        (result(status={"code": "odd"}, contextCreated={}), Kind.STATUS),
        ('{"error": {"code": 3, "message": "no"}}', Kind.ERROR),
        ('{"result": {"status": {"code": 3, "message": "no"}}}', Kind.ERROR),
    ],
)
def test_kinds(text: str, kind: Kind) -> None:
    """Each frame is told by its payload or its error, with unknown keys and without a status too."""
    frame = protocol.parse(text)
    assert frame.kind is kind
    assert frame.context == (None if kind is Kind.ERROR else "c1")
    assert bool(frame.code) is (kind in (Kind.STATUS, Kind.ERROR))


@pytest.mark.parametrize(
    "text",
    [
        "this is not JSON",
        '{"result": null}',
        "[1]",
        "",
        "{}",
        "null",
        "[" * 100_000,
        '{"result": {"audioChunk": {"audioContent": "AAAA',
    ],
)
def test_malformed(text: str) -> None:
    """A text that is no frame raises Malformed, and nothing else, however it is broken."""
    with pytest.raises(Malformed):
        protocol.parse(text)


@relaxed
@given(st.text(max_size=50))
def test_any_text_is_a_frame_or_malformed(text: str) -> None:
    """No text makes the parser raise anything else."""
    for parser in (protocol.parse, protocol.parse_request):
        try:
            parser(text)
        except Malformed:
            continue


@relaxed
@given(
    st.permutations(["contextId", "status", "audioChunk"]),
    st.permutations(["audioContent", "usage", "timestampInfo"]),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " :\t")]),
    st.lists(st.text(max_size=20) | st.just('"audioContent": "x') | st.just("audioContent"), max_size=3),
)
def test_audio_is_found_in_any_order(
    outer: list[str], inner: list[str], separators: tuple[str, str], words: list[str]
) -> None:
    """The audio is the one string after its key, wherever that stands and whatever the words say."""
    chunk = {
        "audioContent": AUDIO,
        "usage": {"processedCharactersCount": 3},
        "timestampInfo": {"wordAlignment": {"words": words}},
    }
    fields = {"contextId": "c1", "status": {"code": 0}, "audioChunk": {key: chunk[key] for key in inner}}
    text = json.dumps({"result": {key: fields[key] for key in outer}}, separators=separators)
    frame = protocol.parse(text)
    assert (frame.kind, frame.context, frame.payload) == (Kind.AUDIO, "c1", AUDIO)


def test_readdressed_frame_keeps_its_bytes() -> None:
    """Only the id changes, and an id that needs escapes is escaped."""
    text = json.dumps({"result": {"contextId": "lc-00ff", "audioChunk": {"audioContent": AUDIO}}})
    moved = protocol.readdress(text, "lc-00ff", 'my "id"\n')
    assert json.loads(moved)["result"]["contextId"] == 'my "id"\n'
    assert moved.replace(json.dumps('my "id"\n'), '"lc-00ff"') == text


def test_requests() -> None:
    """A client's frame asks for one thing; what is unknown is passed, what is contradictory is not."""
    assert protocol.parse_request('{"create": {}, "contextId": "a"}').action is Action.CREATE
    assert protocol.parse_request('{"close_context": {}}').context is None
    assert protocol.parse_request('{"brand_new": {}, "contextId": "a"}').action is Action.OTHER
    for text in ('{"create": {}, "close_context": {}}', '{"create": {}, "contextId": 3}', "[]"):
        with pytest.raises(Malformed):
            protocol.parse_request(text)


@relaxed
@given(st.text(), st.integers(2, 40))
def test_split_loses_nothing(text: str, limit: int) -> None:
    """Joined, the pieces are the text; none is longer than the limit."""
    pieces = split(text, limit)
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)


def test_split_prefers_white_space() -> None:
    """Where there is a space in the latter half, no word is cut."""
    words = ("word " * 500).strip()
    assert all(piece.split() == ["word"] * len(piece.split()) for piece in split(words))
    assert len(split(words)) == 3


def test_backoff_doubles_to_its_cap() -> None:
    """0.5, 1, 2, 4, 8, 8 seconds, less up to half; a success begins anew."""
    backoff = Backoff(0.5, 8.0, jitter=REDIAL_JITTER, random=random.Random(1))
    for step in (0.5, 1.0, 2.0, 4.0, 8.0, 8.0):
        assert step / 2 <= backoff.fail() <= step
    backoff.succeed()
    assert backoff.fail() <= 0.5


def idle(since: float, *, used: bool = True) -> tuple[float, PoolEntry]:
    entry = PoolEntry(1)
    entry.was_used = used
    return since, entry


def plan(entries: list[tuple[float, PoolEntry]], at: float, **changes: bool) -> idling.IdlePlan:
    settings = {"is_all": True, "has_room": True, **changes}
    return idling.plan(entries, at=at, timeout=300.0, warm=540.0, **settings)


def test_all_idle_connections_but_the_freshest_are_closed() -> None:
    """After 300 s idle each is closed, except the last open one."""
    entries = [idle(0.0), idle(10.0), idle(200.0)]
    assert plan(entries, 300.0).close == (entries[0][1],)
    assert plan(entries, 300.0).look_at == 310.0
    assert plan(entries, 500.0).close == (entries[0][1], entries[1][1])
    assert plan(entries, 500.0).look_at == 740.0
    assert plan(entries[:1], 300.0, is_all=False).close == (entries[0][1],)


def test_the_warm_connection_is_replaced_before_the_server_ends_it() -> None:
    """At 540 s: replaced if it was used since it was dialled, else closed, and then nothing is kept."""
    used, unused = idle(0.0), idle(0.0, used=False)
    assert plan([used], 539.0).look_at == 540.0
    assert plan([used], 540.0).replace is used[1]
    assert plan([used], 540.0, has_room=False).close == (used[1],)
    assert plan([unused], 540.0).close == (unused[1],)


def test_tables_end_everywhere() -> None:
    """From every state of a context or a connection its end can be reached; the end takes nothing."""
    for table, states, end in (
        (CONTEXT_TABLE, ContextState, ContextState.ENDED),
        (CONNECTION_TABLE, ConnectionState, ConnectionState.GONE),
    ):
        assert not [key for key in table if key[0] is end]
        reach = {end}
        for _ in states:
            reach |= {before for (before, _), after in table.items() if after in reach}
        assert reach == set(states)
