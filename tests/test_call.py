"""`lastcall.call` in one process: both ends of the way between a call and its worker, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import os
import random
import secrets
import socket
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lastcall
from lastcall import Call, Notice
from lastcall.worker import call_channels
from lastcall.worker.base import budget
from lastcall.worker.base.clock import now
from lastcall.worker.base.wire import AskExtension, Drain, Limit, encode
from lastcall.worker.call_channels import Calls
from lastcall.worker.job import call as call_module

PATIENCE = 30.0
CLOSE_NEEDED = 5.0


class Process:
    """Stands for livekit-agents' JobProcess."""


def context(job: str, calls: Calls | None) -> Any:  # stands for a JobContext, which has no public constructor
    process = Process()
    if calls is not None:
        call_module.begin(process, calls.address)
    return SimpleNamespace(proc=process, job=SimpleNamespace(id=job))


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def worker() -> AsyncIterator[Calls]:
    calls = Calls(close_needed=CLOSE_NEEDED)
    calls.open(asyncio.get_running_loop())
    try:
        yield calls
    finally:
        calls.close()


@asynccontextmanager
async def joined(calls: Calls, job: str = "AJ_1") -> AsyncIterator[Call]:
    ctx = context(job, calls)
    call = lastcall.call(ctx)
    await until(lambda: job in {channel.job for channel in calls._channels})
    try:
        yield call
    finally:
        await call_module.end(ctx.proc)


def limits(drain: float, close: float = 10.0, **more: Any) -> Drain:
    at = now() + drain
    return Drain(drain_at=at, close_at=at + close, **more)


async def test_one_call_for_a_job() -> None:
    """The same object each time, another one for another job, and none that outlives its job."""
    async with worker() as calls:
        ctx, other = context("AJ_1", calls), context("AJ_2", calls)
        call = lastcall.call(ctx)
        assert lastcall.call(ctx) is call
        assert lastcall.call(other) is not call
        assert not call.is_inert
        for each in (ctx, other):
            await call_module.end(each.proc)
        assert call.is_inert and lastcall.call(ctx) is call
        await until(lambda: not calls._channels)
        seen = weakref.ref(call)
        del call, ctx
        gc.collect()
        assert seen() is None


async def test_a_job_that_lastcall_does_not_run(caplog: pytest.LogCaptureFixture) -> None:
    """The call says that it is inert, in a property and in one line of the log, and nothing else happens."""
    with caplog.at_level(logging.INFO, "lastcall"):
        ctx = context("AJ_1", None)
        call = lastcall.call(ctx)
        assert lastcall.call(ctx) is call
    assert call.is_inert and not call.stopping.is_set() and call.stopping.notice is None
    assert call.on_stopping(print) is print
    assert await call.extend(10) is None
    assert len([record for record in caplog.records if "does not run under lastcall" in record.message]) == 1
    await call_module.end(ctx.proc)
    await call_module.end(Process())


def test_outside_the_event_loop() -> None:
    """The error says where a call can be had."""
    with pytest.raises(RuntimeError, match="event loop of the job"):
        lastcall.call(context("AJ_1", None))


async def test_the_event_and_the_functions() -> None:
    """Each way to be told of the stop tells the same: reason, deadline, seconds left."""
    heard: list[tuple[str, Notice]] = []
    async with worker() as calls, joined(calls) as call:
        waiting = [asyncio.ensure_future(call.stopping), asyncio.ensure_future(call.stopping.wait())]

        @call.on_stopping
        def plain(notice: Notice) -> None:
            heard.append(("plain", notice))

        @call.on_stopping
        async def later(notice: Notice) -> None:
            await asyncio.sleep(0)
            heard.append(("later", notice))

        await asyncio.sleep(0)
        assert not call.stopping.is_set()
        deadlines = limits(30, cause="reload")
        calls.tell(deadlines)
        told = await asyncio.gather(*waiting)
        await until(lambda: len(heard) == 2)
        assert dict(heard).keys() == {"plain", "later"}
        for notice in (*told, *dict(heard).values(), call.stopping.notice):
            assert notice == Notice(reason="reload", deadline=deadlines.drain_at)
            assert notice.is_first and 0 < notice.seconds_left <= 30
        call.on_stopping(lambda notice: heard.append(("late", notice)))
        assert len(heard) == 2
        await until(lambda: len(heard) == 3)
        assert heard[-1] == ("late", told[0])
        assert await call.stopping == told[0]
    assert Notice(reason="stop", deadline=now() - 1).seconds_left == 0


async def test_a_call_that_joins_after_the_fence() -> None:
    """It is told at once: its offer was accepted before the fence, and its process started after it."""
    async with worker() as calls:
        calls.tell(limits(30))
        async with joined(calls) as call:
            assert (await call.stopping).reason == "stop"


async def test_a_deadline_that_moves() -> None:
    """A function hears again of half a second or more, and of another reason; the event has it always."""
    heard: list[Notice] = []
    async with worker() as calls, joined(calls) as call:
        call.on_stopping(heard.append)
        first = limits(30)
        calls.tell(first)
        await until(lambda: heard)
        at = first.drain_at

        async def tell(drain_at: float, cause: Any = "stop") -> None:
            calls.tell(Drain(drain_at=drain_at, close_at=drain_at + 10, cause=cause))
            await until(lambda: call.stopping.notice == Notice(reason=cause, deadline=drain_at))

        await tell(at - 0.3)
        assert len(heard) == 1
        await tell(at - 0.6)  # the sum of both moves
        await tell(at - 0.6, "recycle")
        await tell(at - 20, "recycle")
        assert [(notice.reason, notice.is_first) for notice in heard] == [
            ("stop", True),
            ("stop", False),
            ("recycle", False),
            ("recycle", False),
        ]
        assert [notice.deadline for notice in heard] == [at, at - 0.6, at - 0.6, at - 20]


async def test_functions_that_raise(caplog: pytest.LogCaptureFixture) -> None:
    """Each exception is logged; the functions after it are called, and nothing else ends."""
    heard: list[Notice] = []

    def raises(_notice: Notice) -> None:
        raise ZeroDivisionError

    def cancels(_notice: Notice) -> None:
        raise asyncio.CancelledError

    async def raises_later(_notice: Notice) -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    async with worker() as calls, joined(calls) as call:
        for function in (raises, cancels, raises_later, heard.append):
            call.on_stopping(function)
        calls.tell(limits(30))
        await until(lambda: heard and not call._tasks)
        assert not call.is_inert
    logged = [record for record in caplog.records if "on_stopping raised" in record.message]
    assert len(logged) == 3 and all(record.exc_info for record in logged)


async def test_the_context_of_a_function() -> None:
    """A function runs in the context in which it was given: livekit-agents finds the job there."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    heard: list[str] = []

    async def later(_notice: Notice) -> None:
        await asyncio.sleep(0)
        heard.append(variable.get())

    async with worker() as calls, joined(calls) as call:
        variable.set("the job's")
        call.on_stopping(lambda _: heard.append(variable.get()))
        call.on_stopping(later)
        variable.set("another")
        calls.tell(limits(30))
        await until(lambda: len(heard) == 2)
    assert heard == ["the job's", "the job's"]


async def test_the_end_of_a_job() -> None:
    """A function that still runs is cancelled, nobody is told any more, and no socket is left."""
    ended: list[str] = []

    async def for_ever(_notice: Notice) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    async with worker() as calls:
        before = len(os.listdir("/proc/self/fd"))
        async with joined(calls) as call:
            call.on_stopping(for_ever)
            calls.tell(limits(30))
            await until(lambda: call._tasks)
            await asyncio.sleep(0)
        assert ended == ["cancelled"] and not call._tasks and call.is_inert
        await until(lambda: not calls._channels)
        assert len(os.listdir("/proc/self/fd")) == before


async def test_a_function_that_is_slow_to_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of the job waits for it for a bounded time, because connections are closed after it."""
    monkeypatch.setattr(call_module, "CANCEL_WITHIN", 0.05)
    let_go = asyncio.Event()

    async def slow(_notice: Notice) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await let_go.wait()

    async with worker() as calls:
        async with joined(calls) as call:
            call.on_stopping(slow)
            calls.tell(limits(30))
            await until(lambda: call._tasks)
            await asyncio.sleep(0)
        (task,) = call._tasks
        assert not task.done() and call.is_inert
        assert [record for record in caplog.records if "do not end" in record.message]
        let_go.set()
        await until(task.done)


async def test_a_worker_without_a_socket(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system refuses the socket: one line of the worker says so, one of the job, and calls are inert."""
    monkeypatch.setattr(secrets, "token_hex", lambda _bytes: "taken")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(f"\0lastcall-{os.getpid()}-taken")
        before = len(os.listdir("/proc/self/fd"))
        async with worker() as calls:
            ctx = context("AJ_1", calls)
            call = lastcall.call(ctx)
            assert call.is_inert
            calls.tell(limits(30))
            calls.forget("AJ_1")
            assert calls.due_at("AJ_1") == 0.0
            assert await call.extend(5) is None
            await call_module.end(ctx.proc)
        assert len(os.listdir("/proc/self/fd")) == before
    (of_worker, of_job) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "no call can be told" in of_worker.message and "Address already in use" in of_worker.error  # type: ignore[attr-defined]
    assert "has no socket" in of_job.message


async def test_a_worker_that_is_gone() -> None:
    """Its calls are inert from then on, and a question has an answer."""
    async with worker() as calls, joined(calls) as call:
        calls.tell(limits(30))
        deadline = (await call.stopping).deadline
        calls.close()
        await until(lambda: call.is_inert)
        assert await call.extend(5) == deadline
        other = context("AJ_2", calls)
        assert lastcall.call(other).is_inert


async def test_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call has what the close does not need; others have not, and the answer is the deadline that holds."""
    heard: list[Notice] = []
    async with worker() as calls, joined(calls) as call, joined(calls, "AJ_2") as other:
        assert await call.extend(5) is None
        deadlines = limits(30, close=10)
        calls.tell(deadlines)
        await call.stopping
        await other.stopping
        call.on_stopping(heard.append)
        assert calls.due_at("AJ_1") == calls.due_at("AJ_2") == 0.0
        assert await call.extend(0) == deadlines.drain_at
        assert await call.extend(3) == deadlines.drain_at + 3 == calls.due_at("AJ_1")
        assert await call.extend(30) == deadlines.drain_at + 10 - CLOSE_NEEDED
        assert await call.extend(30) == deadlines.drain_at + 10 - CLOSE_NEEDED
        assert call.stopping.notice is not None
        assert call.stopping.notice.deadline == deadlines.drain_at + 5
        await until(lambda: len(heard) == 3)
        assert [notice.is_first for notice in heard] == [True, False, False]
        assert other.stopping.notice is not None and other.stopping.notice.deadline == deadlines.drain_at
        assert calls.due_at("AJ_2") == 0.0
        late = Drain(drain_at=now() - 1, close_at=now() + 30)
        with monkeypatch.context() as patch:  # the job has been asked to shut down
            patch.setattr(calls, "_deadlines", late)
            patch.setattr(calls, "_extended", {})
            assert await call.extend(5) == late.drain_at
        for wrong in (-1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="0 or more"):
                await call.extend(wrong)
        # A drain that is to end sooner ends all extensions, and so does the end of the job.
        sooner = Drain(drain_at=now() + 1, close_at=now() + 11)
        calls.tell(sooner)
        await until(lambda: call.stopping.notice == Notice(reason="stop", deadline=sooner.drain_at))
        assert calls.due_at("AJ_1") == 0.0
        await call.extend(3)
        calls.forget("AJ_1")
        assert calls.due_at("AJ_1") == 0.0
        await until(lambda: call.is_inert)


def test_what_an_extension_can_move() -> None:
    """Never back, never beyond what was asked for, and never into the time that the close needs."""
    rng = random.Random(7)
    for _ in range(2000):
        drain_at, close = rng.uniform(0, 100), rng.uniform(0, 60)
        due_at, seconds, needed = drain_at + rng.uniform(0, 5), rng.uniform(0, 50), rng.uniform(0, 40)
        at = budget.extended(
            due_at, seconds, drain_at=drain_at, close_at=drain_at + close, close_needed=needed
        )
        assert due_at <= at <= due_at + seconds
        assert at == due_at or at <= drain_at + max(0.0, close - needed) + 1e-9
    assert budget.extended(10.0, 5.0, drain_at=10.0, close_at=30.0, close_needed=20.0) == 10.0
    assert budget.extended(10.0, 5.0, drain_at=10.0, close_at=20.0, close_needed=20.0) == 10.0


async def test_a_worker_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A question ends after a bounded time, with the deadline that is known."""
    monkeypatch.setattr(call_module, "ANSWER_WITHIN", 0.05)
    async with worker() as calls, joined(calls) as call:
        calls.tell(limits(30))
        deadline = (await call.stopping).deadline
        monkeypatch.setattr(calls, "_extend", lambda *_: None)
        assert await call.extend(5) == deadline
        assert [record for record in caplog.records if "has not answered" in record.message]
        assert not call._answers


async def test_a_job_that_is_stuck() -> None:
    """Telling never waits: the job finds the messages when its loop turns again, or is told no more."""
    async with worker() as calls, joined(calls) as call:
        loop = asyncio.get_running_loop()
        assert call._sock is not None
        loop.remove_reader(call._sock.fileno())
        began = time.monotonic()
        calls.tell(limits(30))
        calls.tell(limits(20))
        assert time.monotonic() - began < PATIENCE / 10
        assert not call.stopping.is_set()
        loop.add_reader(call._sock.fileno(), call._read)
        await until(lambda: call.stopping.notice is not None and call.stopping.notice.seconds_left < 25)
        loop.remove_reader(call._sock.fileno())
        for _ in range(10_000):
            calls.tell(limits(30))
            if not calls._channels:
                break
        assert not calls._channels
        loop.add_reader(call._sock.fileno(), call._read)
        await until(lambda: call.is_inert)


async def test_a_worker_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """More calls than can wait to be let in try again, and each is told in the end."""
    monkeypatch.setattr(call_channels, "BACKLOG", 1)
    monkeypatch.setattr(call_module, "CONNECT_AGAIN_AFTER", 0.01)
    calls = Calls(close_needed=CLOSE_NEEDED)
    contexts = [context(f"AJ_{n}", calls) for n in range(8)]
    made = [lastcall.call(ctx) for ctx in contexts]
    assert any(call._connect_again for call in made) and not any(call.is_inert for call in made)
    given_up = next(n for n, call in enumerate(made) if call._connect_again)
    await call_module.end(contexts[given_up].proc)
    assert made[given_up].is_inert
    calls.open(asyncio.get_running_loop())
    calls.tell(limits(30))
    for n, call in enumerate(made):
        if n != given_up:
            async with asyncio.timeout(PATIENCE):
                await call.stopping
        await call_module.end(contexts[n].proc)
    calls.close()


async def test_whoever_else_connects(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another user is not let in, nor is nonsense, and a question of no job is not answered."""
    async with worker() as calls, joined(calls) as call:

        def connect() -> socket.socket:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.settimeout(PATIENCE)
            sock.connect(calls.address)
            return sock

        async def is_closed(sock: socket.socket) -> bool:
            with contextlib.suppress(ConnectionResetError):
                return await asyncio.to_thread(sock.recv, 100) == b""
            return True

        for nonsense in (b"nonsense\n", b"x" * 20_000, b'{"type": "call_joined", "v": 2, "job": 7}'):
            with connect() as sock:
                sock.send(nonsense)
                assert await is_closed(sock)
        with connect() as sock:
            sock.send(b'{"type": "of_a_newer_version", "v": 2}')
            sock.send(encode(AskExtension(id=1, seconds=5.0)))
            calls.tell(limits(30))
            await call.stopping
            sock.send(encode(AskExtension(id=2, seconds=5.0)))
            sock.send(b"nonsense")
            assert await is_closed(sock)
        assert calls._extended == {}
        monkeypatch.setattr(call_channels, "is_of_this_user", lambda _sock: False)
        with connect() as sock:
            assert await is_closed(sock)
        monkeypatch.setattr(call_module, "is_of_this_user", lambda _sock: False)
        stranger = context("AJ_2", calls)
        assert lastcall.call(stranger).is_inert
        assert not call.is_inert
        # The other direction: a job that hears nonsense hears no more.
        (channel,) = calls._channels
        channel.sock.send(b"nonsense")
        await until(lambda: call.is_inert)
    assert len([record for record in caplog.records if "said something wrong" in record.message]) == 4


async def test_a_worker_that_dies() -> None:
    """Its successor leaves the call to the predecessor, unless it has said that it speaks."""
    ended: list[str] = []
    arriving: Any = SimpleNamespace(end=ended.append)
    async with worker() as calls, joined(calls) as call:
        call._arriving = arriving
        calls.close()
        await until(lambda: ended)
        call._arriving = None
    assert ended == ["the worker of the successor has died"]


async def test_no_descriptor_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that can't let a call in tries again later, and does not turn in circles until then."""
    monkeypatch.setattr(call_channels, "ACCEPT_AGAIN_AFTER", 0.05)
    async with worker() as calls:
        listener, lacks = calls._listener, 2
        assert listener is not None
        accept = listener.accept

        class Lacking:
            def accept(self) -> Any:
                nonlocal lacks
                if lacks:
                    lacks -= 1
                    raise OSError(24, "Too many open files")
                return accept()

            def __getattr__(self, name: str) -> Any:
                return getattr(listener, name)

        stand_in: Any = Lacking()
        monkeypatch.setattr(calls, "_listener", stand_in)
        async with joined(calls) as call:
            calls.tell(limits(30))
            await call.stopping
    assert len([record for record in caplog.records if "can't be let in" in record.message]) == 2


async def test_what_a_job_has_forked() -> None:
    """A child of the job holds its socket open; the worker closes the other end when the job has ended."""
    async with worker() as calls, joined(calls) as call:
        assert call._sock is not None
        with call._sock.dup():  # as a fork has it
            await call.aclose()
            await asyncio.sleep(0.01)
            assert calls._channels
            calls.forget("AJ_1")
            assert not calls._channels


def test_a_limit_is_small() -> None:
    """No message that a worker says can be longer than a call reads."""
    assert len(encode(Limit(cause="recycle", due_at=1e300, answers=2**63))) < call_module.MAX_MESSAGE_BYTES


def test_the_page_shows_the_example() -> None:
    """The code on the page is that of the example, line by line."""
    root = Path(__file__).parent.parent
    page = (root / "docs" / "goodbye.md").read_text()
    shown = page[page.index("    call = lastcall.call(ctx)") : page.index("```\n\n```sh")]
    assert "@call.on_stopping" in shown
    assert shown in (root / "examples" / "goodbye" / "agent.py").read_text()
