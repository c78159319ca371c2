"""The capsule of a call: what fits, what does not, and that nothing of it is told."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastcall.worker.job import capsule as capsule_module
from lastcall.worker.job.capsule import MAX_BYTES, MAX_DEPTH, Busy, Capsule, NotJson, TooLarge, encode

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)
SECRET = "my card is 4111"


@given(state=JSON)
def test_a_successor_reads_the_same(state: object) -> None:
    """Every JSON value comes back equal; a text that UTF-8 can't have is refused."""
    try:
        line = encode(state)
    except NotJson:
        assert any(0xD800 <= ord(letter) <= 0xDFFF for letter in json.dumps(state, ensure_ascii=False))
    else:
        assert json.loads(line) == state


@pytest.mark.parametrize("letter", ["x", "ü", "字", "😀"])
def test_the_limit_is_one_of_bytes(letter: str) -> None:
    """256 kB of text with the quotes fit in any language, and one letter more does not; the limit is told."""
    size = len(letter.encode())
    fits = letter * ((MAX_BYTES - 2) // size)
    assert MAX_BYTES - size < len(encode(fits)) <= MAX_BYTES
    with pytest.raises(TooLarge, match=r"262144"):
        encode(fits + letter)
    assert encode(1) == b"1"


def itself() -> list[Any]:
    state: list[Any] = [SECRET]
    state.append(state)
    return state


def deep(levels: int) -> list[Any]:
    state: list[Any] = [SECRET]
    for _ in range(levels - 1):
        state = [state]
    return state


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({1: SECRET}, NotJson),
        ({(SECRET,): 1}, NotJson),
        ({SECRET: {1, 2}}, NotJson),
        (SECRET.encode(), NotJson),
        ([SECRET, float("nan")], NotJson),
        (float("inf"), NotJson),
        (SECRET + "\ud800", NotJson),
        (deep(MAX_DEPTH + 1), NotJson),
        (deep(50_000), NotJson),
        (itself(), TooLarge),
        ([SECRET] * 10_000_000, TooLarge),
        ({SECRET * 100_000: 1}, TooLarge),
        ([SECRET * 100_000] * 1_000_000, TooLarge),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_states_that_are_refused(state: object, error: type[Exception]) -> None:
    """The error is of the class that the page names, shows nothing of the state, and comes at once."""
    began = time.process_time()
    with pytest.raises(error) as raised:
        encode(state)
    assert time.process_time() - began < 5
    shown = repr(raised.value) + repr(raised.value.__cause__)
    assert "4111" not in shown
    assert issubclass(error, TypeError if error is NotJson else ValueError)
    assert json.loads(encode(deep(MAX_DEPTH))) == deep(MAX_DEPTH)


async def test_the_last_state_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is kept as it was, a provider is asked when it is needed, and each has its limits."""
    kept = Capsule()
    assert kept.about is None and await kept.read() is None
    state = {"turns": ["hello"]}
    kept.keep(state)
    state["turns"].append("later")
    assert await kept.read() == b'{"turns":["hello"]}'
    assert kept.about is not None and kept.about[0] == 19 and kept.about[1] > 0
    with pytest.raises(TooLarge):
        kept.keep("x" * MAX_BYTES)
    assert await kept.read() == b'{"turns":["hello"]}', "it stays"
    kept.keep(lambda: state)
    assert await kept.read() == b'{"turns":["hello","later"]}'
    assert kept.about is not None and kept.about[0] == 0

    async def later() -> object:
        await asyncio.sleep(0)
        return {1: 2}

    kept.keep(later)
    with pytest.raises(NotJson):
        await kept.read()
    monkeypatch.setattr(capsule_module, "PROVIDER_WITHIN", 0.01)
    kept.keep(asyncio.Event().wait)
    with pytest.raises(TimeoutError):
        await kept.read()


async def test_busy_counts_its_users() -> None:
    """Busy until the last block is left, whatever ends it."""
    busy = Busy()
    await busy.until_idle()
    with pytest.raises(ZeroDivisionError):
        async with busy.during(), busy.during():
            assert busy.is_busy
            raise ZeroDivisionError
    assert not busy.is_busy
    async with busy.during():
        waiting = asyncio.ensure_future(busy.until_idle())
        await asyncio.sleep(0)
        async with busy.during():
            pass
        await asyncio.sleep(0)
        assert not waiting.done() and busy.is_busy
    await waiting
