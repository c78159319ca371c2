"""The small parts of the worker: each test states the promise of one."""

from __future__ import annotations

import ast
import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lastcall.worker.base import garbage, variables, wire
from lastcall.worker.base.budget import DEFAULT_GRACE, Shares, installed_entrypoint_wait, plan
from lastcall.worker.base.calls_over import CallsOver, Told, tell
from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.errors import WireError
from lastcall.worker.base.resources import Resources
from lastcall.worker.base.settings import WorkerSettings
from lastcall.worker.base.stopping import SHIELDED, unshielded
from lastcall.worker.base.wire import MAX_LINE_BYTES, Counts, Decoder, encode
from lastcall.worker.job import setup
from tests.support.sources import nodes_of

Pair = tuple[wire.Vocabulary[Any], wire.Message]
VOCABULARIES: tuple[tuple[wire.Vocabulary[Any], object], ...] = (
    (wire.OF_WORKER, wire.WorkerSays),
    (wire.FOR_WORKER, wire.WorkerHears),
    (wire.OF_BROKER, wire.BrokerSays),
    (wire.FOR_BROKER, wire.BrokerHears),
    (wire.OF_REHEARSED_JOB, wire.RehearsedJobSays),
)
WORDS = [(vocabulary, word) for vocabulary, union in VOCABULARIES for word in get_args(union)]
finite = st.floats(allow_nan=False, allow_infinity=False)
st.register_type_strategy(float, finite)
said = st.sampled_from(WORDS).flatmap(lambda pair: st.tuples(st.just(pair[0]), st.from_type(pair[1])))
from_worker = st.lists(st.one_of(*map(st.from_type, get_args(wire.WorkerSays))), max_size=5)
json_values = st.none() | st.booleans() | finite | st.text(max_size=5) | st.lists(st.integers(), max_size=2)


@given(said)
def test_wire_returns_what_was_said(pair: Pair) -> None:
    """Every message of each side comes out of its line as the value that went in."""
    vocabulary, message = pair
    assert vocabulary.decode(encode(message)) == message


@given(from_worker, st.integers(1, 7))
def test_wire_survives_any_cut(messages: list[wire.WorkerSays], size: int) -> None:
    """However the stream is cut into chunks, the same messages come out."""
    stream = b"".join(map(encode, messages))
    decoder = Decoder(wire.OF_WORKER)
    out = [m for i in range(0, len(stream), size) for m in decoder.feed(stream[i : i + size])]
    assert out == messages


@given(said, st.dictionaries(st.text(max_size=8).map("x-".__add__), json_values, max_size=3))
def test_wire_ignores_what_is_newer(pair: Pair, more: dict[str, Any]) -> None:
    """Unknown keys of a known message, and unknown messages, are no error: the other side may be newer."""
    vocabulary, message = pair
    document = json.loads(encode(message))
    assert vocabulary.decode(json.dumps({**more, **document}).encode()) == message
    unknown = json.dumps({**document, "type": "x-" + document["type"]}).encode() + b"\n"
    assert Decoder(vocabulary).feed(unknown + encode(message)) == [message]


@given(said, st.data())
def test_wire_refuses_bad_values(pair: Pair, data: st.DataObject) -> None:
    """A known message with a field missing, or of another type, is an error; its text quotes no value."""
    vocabulary, message = pair
    document = json.loads(encode(message))
    names = sorted(document.keys() - {"type", "v"})
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    bad: dict[str, Any] = {**document, name: [["secret"]]}
    with pytest.raises(WireError, match=f"has a bad {name}$"):
        vocabulary.decode(json.dumps(bad).encode())
    del bad[name]
    default = next(each.default for each in fields(message) if each.name == name)
    if default is not MISSING:
        assert getattr(vocabulary.decode(json.dumps(bad).encode()), name) == default
        return
    with pytest.raises(WireError, match=f"has no {name}$"):
        vocabulary.decode(json.dumps(bad).encode())


@pytest.mark.parametrize(
    "line",
    [
        b'{"type":"drain","v":2,"drain_at":NaN,"close_at":1}',
        b'{"type":"drain","v":2,"drain_at":Infinity,"close_at":1}',
        b'{"type":"drain","v":2,"drain_at":true,"close_at":1}',
        b'{"type":"drain","v":2,"drain_at":"1","close_at":1}',
        b'{"type":"hold","v":2,"on":1}',
        b'{"type":"ask_metrics","v":2,"id":1.5}',
    ],
)
def test_wire_is_strict_about_numbers(line: bytes) -> None:
    """A deadline that is no time would never pass; a number is no bool, and a bool no number."""
    with pytest.raises(WireError, match="has a bad"):
        wire.FOR_WORKER.decode(line)


@pytest.mark.parametrize(
    "line", [b"x", b"[]", b"{}", b'{"type":1,"v":2}', b'{"type":"a","v":1}', b"[" * 9999]
)
def test_wire_refuses_what_is_no_message(line: bytes) -> None:
    """A line that is no JSON object with a type and the version of this protocol raises WireError."""
    with pytest.raises(WireError):
        wire.OF_WORKER.decode(line)


def test_wire_is_bounded() -> None:
    """Neither side makes nor keeps a line without end."""
    with pytest.raises(WireError):
        encode(wire.Fence(reason="x" * MAX_LINE_BYTES))
    with pytest.raises(WireError):
        Decoder(wire.OF_WORKER).feed(b"x" * (MAX_LINE_BYTES + 1))


def test_the_key_is_not_shown() -> None:
    """A message that is logged by mistake does not tell the API key."""
    assert "secret" not in repr(wire.Key(key="secret"))


async def test_bell_follows_a_deadline_that_moves() -> None:
    """A waiter reads the deadline and the predicate afresh at every notification."""
    changed = Condition()
    deadline = [now() + 60.0]
    waiting = asyncio.create_task(changed.until(lambda: False, lambda: deadline[0]))
    await asyncio.sleep(0)
    deadline[0] = now()
    changed.notify()
    async with asyncio.timeout(5):
        assert await waiting is False


async def test_condition_loses_no_wakeup() -> None:
    """Each of many waiters is woken once its predicate holds; a cancelled one leaves nothing behind."""
    changed = Condition()
    state: list[int] = []

    async def reaches(n: int) -> bool:
        return await changed.until(lambda: len(state) > n)

    waiters = [asyncio.create_task(reaches(n)) for n in range(50)]
    await asyncio.sleep(0)
    waiters[10].cancel()
    for n in range(50):
        state.append(n)
        changed.notify()
    async with asyncio.timeout(5):
        results = await asyncio.gather(*waiters, return_exceptions=True)
    assert [r for r in results if r is not True] == [results[10]]
    assert not changed._waiters


async def test_resources_close_in_reverse_once_and_bounded() -> None:
    """One that hangs or fails is forced and does not keep the others from their turn."""
    order: list[str] = []
    resources = Resources()

    async def good(_deadline: float) -> Counts:
        order.append("good")
        return {"sockets": {"closed": 2}}

    async def hangs(_deadline: float) -> Counts:
        order.append("hangs")
        await asyncio.sleep(60)
        return {}

    async def fails(_deadline: float) -> Counts:
        order.append("fails")
        raise OSError("no")

    resources.join("good", good)
    resources.join("fails", fails)
    resources.join("hangs", hangs)
    census, again = await asyncio.gather(resources.aclose(now() + 0.2), resources.aclose(now() + 0.2))
    assert census == again == await resources.aclose(now())
    assert order == ["hangs", "fails", "good"]
    # The deadline has passed when the turn of "good" comes. A closer that does not wait ends all the same.
    assert [(r.name, r.fate) for r in census] == [
        ("hangs", "forced"),
        ("fails", "forced"),
        ("good", "closed"),
    ]
    with pytest.raises(RuntimeError):
        resources.join("late", good)


settings = st.builds(
    WorkerSettings,
    grace=st.floats(0.1, 1e6),
    shares=st.builds(
        Shares, **{name: st.floats(0.1, 1e3) for name in ("fence", "close", "terminate", "kill")}
    ),
    max_running=st.integers(0, 100),
    output_fds=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    control_fd=st.none() | st.integers(3, 9),
    scratch=st.text(max_size=10),
)


@given(settings)
def test_settings_leave_the_environment(given: WorkerSettings) -> None:
    """A worker takes what the supervisor hands over, as it was; the children of the worker do not see it."""
    environment = {"LASTCALL_WORKER": given.to_json()}
    assert WorkerSettings.take(environment) == given
    assert environment == {}


def test_settings_of_an_older_supervisor() -> None:
    """After an upgrade a running supervisor starts newer workers: no key too many or too few is an error."""
    text = json.dumps({"control_fd": 3, "drain": 5, "output_fds": [4, 5], "shares": {"handover": 5}})
    assert WorkerSettings.from_json(text) == WorkerSettings(control_fd=3, output_fds=(4, 5))


def test_settings_of_a_worker_alone() -> None:
    """LASTCALL_GRACE is its whole budget, laid out for the livekit-agents that is installed."""
    planned = WorkerSettings.take({"LASTCALL_GRACE": "20"}).plan(0.0)
    assert planned.drain_at == (10 if installed_entrypoint_wait() == 0 else 5)
    assert WorkerSettings.take({}).plan(0.0).drain_at == 3570
    for wrong in ("", "soon", "-1", "inf", "nan"):
        assert WorkerSettings.take({"LASTCALL_GRACE": wrong}).grace == DEFAULT_GRACE


@given(settings, st.floats(0, 1e6))
def test_a_lost_worker_keeps_the_budget(given: WorkerSettings, started_at: float) -> None:
    """A worker whose supervisor is gone lays its stop out exactly as the supervisor would have."""
    assert given.plan(started_at) == plan(started_at, given.grace, given.shares)


@pytest.mark.parametrize("how", ["blocked", "ignored", "open"])
def test_unshielded_reads_proc(how: str) -> None:
    """Blocked, ignored and caught signals are no danger; an open one is named."""
    line = {
        "blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, numbers)",
        "ignored": "[signal.signal(n, signal.SIG_IGN) for n in numbers]",
        "open": "[signal.signal(n, signal.SIG_DFL) for n in numbers]",
    }[how]
    numbers = f"numbers = {[int(number) for number in SHIELDED]}"
    code = f"import signal,sys; {numbers}; {line}; print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        expected = set(SHIELDED) if how == "open" else set()
        assert set(unshielded(child.pid)) == expected
        child.stdin.close()
        child.wait(10)
        assert unshielded(child.pid) == frozenset()


def test_shield_loses_no_signal() -> None:
    """A SIGTERM that waits for its handler goes on waiting while the shield is raised."""
    code = (
        "import asyncio, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})\n"
        "import os; os.kill(os.getpid(), signal.SIGTERM)\n"
        "from lastcall.worker.shield import raise_shield\n"
        "loop = asyncio.new_event_loop()\n"
        "raise_shield(loop)\n"
        "print(signal.SIGTERM in signal.sigpending())\n"
        "print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\nTrue\n"), done


def test_worker_alone_says_its_usage() -> None:
    """`python -m lastcall.worker` ends with 2 and one line without a target, and with 78 for a wrong one."""
    command = [sys.executable, "-m", "lastcall.worker"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=20)
    assert done.returncode == 2 and b"usage: python -m lastcall.worker TARGET" in done.stderr
    done = subprocess.run([*command, "none.py"], capture_output=True, check=False, timeout=20, cwd="/")
    assert done.returncode == 78 and done.stderr.startswith(b"lastcall: no file 'none.py'")


def test_variables_have_their_names_in_one_place() -> None:
    """No code spells the name of a variable of lastcall out; the sample is an agent as users write them."""
    prefix = variables.PREFIX
    names = {
        value for value in vars(variables).values() if isinstance(value, str) and value.startswith(prefix)
    }
    root = Path(variables.__file__).parents[2]
    for path in [*(root / "worker").rglob("*.py"), *(root / "supervisor").rglob("*.py")]:
        if path.name in ("variables.py", "sample.py"):
            continue
        for node in nodes_of(path):
            spelled = isinstance(node, ast.Constant) and node.value in names - {prefix}
            assert not spelled, f"{path}:{getattr(node, 'lineno', 0)}"


def test_calls_that_are_over_are_told() -> None:
    """In the order in which they ended; no job waits for a worker that is stuck."""
    calls = CallsOver()
    assert calls.take() == []
    for id in ("AJ_1", "AJ_2"):
        tell(calls.writer, id)
    tell(calls.writer, "AJ 3", "left", 5)
    assert calls.take() == [Told("AJ_1", "over"), Told("AJ_2", "over"), Told("AJ 3", "left", 5)]
    for _ in range(20_000):
        tell(calls.writer, "AJ_3")
    assert set(calls.take()) == {Told("AJ_3", "over")}


def test_no_collections_during_imports() -> None:
    """Automatic collections stop inside and go on behind; a threshold that the agent has set stays."""
    before = gc.get_threshold()
    with garbage.no_collections():
        assert gc.get_threshold()[0] == 0 and gc.isenabled()
    assert gc.get_threshold() == before
    try:
        with garbage.no_collections():
            gc.set_threshold(5000, 5, 5)
        assert gc.get_threshold() == (5000, 5, 5)
    finally:
        gc.set_threshold(*before)


@pytest.mark.core
def test_signals_of_a_job_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job ignores them, keeps a handler of the agent, and writes its stacks at livekit-agents' signal."""
    from livekit.agents.ipc import proc_client

    dumped: list[int] = []
    monkeypatch.setattr(proc_client, "_dump_stack_traces", lambda number, _frame: dumped.append(number))
    monkeypatch.setenv(variables.WORKER_PID, "1")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
    before = {number: signal.getsignal(number) for number in SHIELDED}
    try:
        for number in SHIELDED:
            signal.signal(number, signal.SIG_DFL)
        heard: list[int] = []
        signal.signal(signal.SIGHUP, lambda number, _frame: heard.append(number))
        setup.unmask()
        for number in SHIELDED:
            os.kill(os.getpid(), number)
        assert (dumped, heard) == ([signal.SIGUSR1], [signal.SIGHUP])
        assert not setup.has_handler()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
