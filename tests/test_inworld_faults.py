"""Faults in lastcall itself: each ends the thing that raised it, is counted, and harms nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable

import pytest

from lastcall.worker.inworld.pool import protocol
from lastcall.worker.inworld.pool.capacity import Capacity
from lastcall.worker.inworld.pool.connection import Connection
from lastcall.worker.inworld.pool.context import Context
from lastcall.worker.inworld.pool.errors import ConnectionLost, InworldError, LastcallFault
from lastcall.worker.inworld.pool.open_connections import Connections
from lastcall.worker.inworld.pool.pool import InworldPool
from lastcall.worker.inworld.pool.protocol import Action, Frame
from lastcall.worker.local.inworld_server import Faults
from tests.support.broker import LONG, SPEAKING, brokered
from tests.support.inworld import CONFIG, PATIENCE, Pair, pair, quick, until
from tests.support.inworld_job import CONFIG as JOB_CONFIG


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    faults = [record for record in caplog.records if record.getMessage() == "fault in lastcall"]
    assert all(record.levelno == logging.ERROR for record in faults)
    return [vars(record)["traceback"] for record in faults if "traceback" in vars(record)]


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("with a\nnewline", None),
        (None, "ws://user:password@127.0.0.1:{port}/"),
        (None, "ws://a..b:{port}/"),
        (None, "ws://[half:{port}/"),
        (None, "no URL at all"),
    ],
)
async def test_a_handshake_that_raises_ends_alone(
    key: str | None, url: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Speech under way goes on, the caller is told, and with the right key and URL the pool serves again."""
    async with pair(max_contexts=1, is_faulty=True) as p:
        speaking = await p.acquire()
        right_key, right_url = p.server.api_key, p.pool._connections.url
        if key is not None:
            p.pool.set_key(key)
        if url is not None:
            p.pool._connections.url = url.format(port=p.server.port)
        with pytest.raises(InworldError) as caught:
            await p.acquire(timeout=0.5)
        assert "newline" not in str(caught.value) and "password" not in str(caught.value)
        await until(lambda: p.pool.figures.failed_dials)
        assert [frame async for frame in speaking.speak("I go on.")]
        p.pool._connections.url = right_url
        p.pool.set_key(right_key)
        await p.say()
        texts = tracebacks(caplog)
        assert len(texts) <= 1  # however often the handshake was tried
        assert bool(texts) is bool(p.pool.figures.faults)
        assert "password" not in caplog.text and "with a" not in caplog.text


class Broken:
    """A listener that raises at one of its calls."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.ended: list[InworldError | None] = []

    def on_frame(self, frame: Frame, context: Context) -> None:
        if self.where == "frame":
            raise RuntimeError("broken listener")

    def on_end(self, error: InworldError | None, frame: Frame | None, context: Context) -> None:
        self.ended.append(error)
        if self.where == "end":
            raise RuntimeError("broken listener")


@pytest.mark.parametrize("where", ["frame", "end"])
async def test_a_listener_that_raises_costs_its_own_context(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its context is cancelled at the server; the others on the connection are served."""
    async with pair(max_connections=1, is_faulty=True) as p:
        other = await p.acquire()
        for _ in range(3):
            broken = Broken(where)
            context = p.pool.start(CONFIG, broken)
            p.pool.send(context, Action.TEXT, protocol.send_text("Hello."))
            p.pool.close(context)
            await until(lambda b=broken: b.ended)  # type: ignore[misc]  # mypy can't infer it
            assert isinstance(broken.ended[0], LastcallFault) is (where == "frame")
        await until(lambda: p.server.open_contexts == 1)
        assert [frame async for frame in other.speak("I go on.")]
        assert p.pool.figures.faults == 3
        assert len(tracebacks(caplog)) == 1
        assert p.server.counts["connected"] == 1
    p.orderly()


async def test_a_context_that_raises_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """If even its failure raises it is forgotten, and its connection is closed after the others."""
    async with pair(max_connections=1, is_faulty=True) as p:
        other, broken = await p.acquire(), await p.acquire()
        monkeypatch.setattr(protocol, "cancel", lambda: {"a set": {1}})  # no JSON
        p.pool.close(broken.context)
        broken.cancel()
        with pytest.raises(LastcallFault):
            await anext(broken)
        monkeypatch.undo()
        assert p.pool.figures.faults == 2
        assert [frame async for frame in other.speak("I go on.")]
        await until(lambda: p.server.open_connections == 0)
        await p.say()


def raising_once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Have the next call of this method raise."""
    real = getattr(owner, name)

    def raises(self: object, *args: object, **kwargs: object) -> None:
        monkeypatch.setattr(owner, name, real)
        raise ZeroDivisionError

    monkeypatch.setattr(owner, name, raises)


@pytest.mark.parametrize(
    ("owner", "name", "how"),
    [
        (Connection, "report_idle", "closed"),
        (Capacity, "release", "closed"),
        (Connection, "put", "cancelled"),
        (Connection, "watch", "cancelled"),
        (Connections, "retire", "given up"),
        (Capacity, "release", "lost"),
        (Capacity, "request", "lost"),
        (Context, "lose", "lost"),
        (Connections, "retire_silent", "unanswered"),
        (Connections, "retire", "unanswered"),
    ],
)
async def test_a_fault_at_the_end_of_a_context_leaves_nothing(
    owner: type, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner is told once, the place is free, and the pool serves on and closes in order."""
    timings = quick(create=0.2, cancel=0.2, cancel_hint=0.1)
    is_created = how not in ("lost", "unanswered") or name == "lose"
    async with pair(
        faults=Faults(create_unanswered=not is_created, closed_never=how == "given up"),
        timings=timings,
        max_contexts=1,
        max_connections=2,
        is_faulty=True,
    ) as p:
        listener = Broken("nowhere")
        if how == "unanswered":  # the create is given up by itself, on a slow machine before the next line
            raising_once(monkeypatch, owner, name)
        context = p.pool.start(CONFIG, listener)
        await until(lambda: context.is_created if is_created else p.server.open_contexts)
        if how != "unanswered":
            raising_once(monkeypatch, owner, name)
            p.server.faults.create_unanswered = False
        if how == "closed":
            p.pool.close(context)
        elif how in ("cancelled", "given up"):
            p.pool.cancel(context)
        elif how == "lost":
            p.server.cut_connections()
        await until(lambda: p.pool.figures.faults and not p.pool._contexts.claims)
        p.server.faults.create_unanswered = p.server.faults.closed_never = False
        assert len(listener.ended) == 1, listener.ended
        assert p.pool.figures.contexts == 0 and not p.pool._contexts.waiting
        assert await p.say()
        assert p.pool.figures.faults == 1
        assert (await p.pool.aclose()).tasks == 0


async def test_a_start_that_raises_costs_no_other_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the request of a place is told to its owner; one in `start` ends that job's contexts."""
    async with brokered(speech=SPEAKING, is_faulty=True) as s, s.job() as job:
        await job.burst("c", LONG, close=False)
        await job.said("c", "audioChunk")
        raising_once(monkeypatch, Capacity, "request")
        await job.send("d", create=JOB_CONFIG)
        assert await job.said("d", "code") == LastcallFault.code
        assert s.pair.pool.figures.contexts == 1 and not s.pair.pool.figures.waiters
        raising_once(monkeypatch, InworldPool, "start")
        await job.send("e", create=JOB_CONFIG)
        await until(lambda: job.close_code == 1011)
        await until(lambda: s.pair.server.open_contexts == 0)
        assert s.pair.server.counts["cancel_requested"] == 1
        assert s.pair.pool.figures.faults == 2


async def _parse_fails(p: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    real = protocol.parse

    def parse(text: str) -> Frame:
        if "unforeseen" in text:
            raise ZeroDivisionError
        return real(text)

    monkeypatch.setattr(protocol, "parse", parse)
    await p.server.connections[1].send_raw('"unforeseen"')


class NoText(str):
    """A text that can't be sent."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        raise ZeroDivisionError


async def _writing_fails(p: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    next(iter(p.pool.connections.values())).put(NoText("text"))


@pytest.mark.parametrize("how", [_parse_fails, _writing_fails])
async def test_a_connection_that_raises_ends_alone(
    how: Callable[[Pair, pytest.MonkeyPatch], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its contexts are told, its socket is closed; contexts on another connection are served."""
    async with pair(max_contexts=1, is_faulty=True) as p:
        first, second = await p.acquire(), await p.acquire()
        await how(p, monkeypatch)
        with pytest.raises(ConnectionLost):
            await anext(first)
        await until(lambda: p.pool.figures.connections == 1)
        assert [frame async for frame in second.speak("I go on.")]
        assert p.pool.figures.faults == 1
        await p.say()


async def test_a_request_that_raises_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose frame raises loses its connection with code 1011; other jobs are served."""
    async with brokered(speech=SPEAKING, is_faulty=True) as s, s.job() as other:
        await other.burst("c", LONG, close=False)
        await other.said("c", "audioChunk")
        async with s.job() as job:
            await job.send("a", create=JOB_CONFIG)
            await job.said("a", "contextCreated")
            monkeypatch.setattr(protocol, "parse_request", lambda text: json.loads(text)["nothing"])
            await job.send("a", flush_context={})
            await until(lambda: job.close_code == 1011, PATIENCE)
            monkeypatch.undo()
        await until(lambda: s.pair.server.open_contexts == 1)
        assert s.pair.pool.figures.faults == 1
        await other.send("c", cancel_context={})
        await other.said("c", "contextClosed")
    s.pair.orderly()
