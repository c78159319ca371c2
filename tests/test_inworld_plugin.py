"""The end of a job, in this process: the installed Inworld plugin, and `lastcall.closing`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from livekit.agents import APIConnectionError, utils
from livekit.plugins import inworld

import lastcall
from lastcall.worker.base.clock import now
from lastcall.worker.base.inworld_keys import digest
from lastcall.worker.base.wire import Counts
from lastcall.worker.inworld.plugin import private_names
from lastcall.worker.inworld.plugin.arguments import Way, way_of
from lastcall.worker.inworld.plugin.attached import plugin_connections
from lastcall.worker.inworld.plugin.connections import PluginConnections
from lastcall.worker.job import teardown
from lastcall.worker.local.inworld_server import Faults, InworldServer, Speech
from lastcall.worker.sdk import job_process

pytestmark = pytest.mark.core

TIMEOUT = 10.0
LONG = "This is a long sentence, and it goes on for quite a while before it comes to its end. " * 7
ENCODING = "LINEAR16" if inworld.__version__.startswith(("1.3.", "1.4.")) else "PCM"
IS_SHARED = hasattr(inworld.TTS, "_get_connection")  # one connection for all streams, since 1.8.9


class Speaker:
    """The plugin's TTS, and what its streams came to."""

    def __init__(self, tts: Any) -> None:
        self.tts = tts
        self.ended: list[BaseException | None] = []
        self._group: asyncio.TaskGroup

    def speak(self, text: str = LONG) -> None:
        stream = self.tts.stream()
        stream.push_text(text)
        stream.end_input()
        self._group.create_task(self._listen(stream))

    async def _listen(self, stream: Any) -> None:
        try:
            async for _ in stream:
                pass
            self.ended.append(None)
        except Exception as error:
            self.ended.append(error)


@asynccontextmanager
async def speaker(server: InworldServer) -> AsyncIterator[Speaker]:
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        tts = inworld.TTS(
            api_key=server.api_key,
            ws_url=server.ws_url,
            encoding=ENCODING,
            sample_rate=24000,
            http_session=session,
        )
        made = Speaker(tts)
        made._group = group
        yield made


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.005)


def real_time(**faults: Any) -> InworldServer:
    return InworldServer(speech=Speech(pace="real-time"), faults=Faults(**faults))


# -- the close of what the plugin has open ------------------------------------------------------------------


async def test_contexts_first_then_connections() -> None:
    """Contexts in mid-speech are cancelled and ended by the server. Then each connection is closed."""
    count = 5 if IS_SHARED else 8
    async with real_time() as server, speaker(server) as s:
        for _ in range(count):
            s.speak()
        await until(lambda: server.open_contexts == count)
        assert plugin_connections.is_needed
        counts = await plugin_connections.aclose(now() + 5)
        connections = 1 if IS_SHARED else 2
        assert counts == {
            "contexts": {"closed": count, "forced": 0},
            "connections": {"closed": connections, "forced": 0},
        }
        await until(lambda: len(s.ended) == count and server.open_connections == 0)
        assert server.counts["cancel_requested"] == server.counts["context_closed"] == count
        assert {str(e.detail) for e in server.events_of("connection_closed")} == {
            "{'code': 1000, 'clean': True}"
        }
        assert await plugin_connections.aclose(now() + 5) == {}


async def test_nothing_is_opened_after_the_close() -> None:
    """A stream or a prewarm that begins after the end of the job fails, and no connection is made."""
    async with real_time() as server, speaker(server) as s:
        s.speak("Good bye.")
        await until(lambda: s.ended == [None])
        await plugin_connections.aclose(now() + 5)
        s.speak()
        await until(lambda: len(s.ended) == 2)
        assert isinstance(s.ended[1], APIConnectionError)
        s.tts.prewarm()
        await until(lambda: server.open_connections == 0)
        prewarm = getattr(s.tts, "_prewarm_task", None)
        if prewarm is not None:
            await asyncio.wait([prewarm])
            assert isinstance(prewarm.exception(), APIConnectionError)
        assert server.counts["connected"] == 1


@pytest.mark.parametrize("faults", [{"handshake_hang": True}, {"handshake_delay": 0.5}])
async def test_a_handshake_under_way(faults: dict[str, Any]) -> None:
    """It is given up: the server sees it end, and no connection opens behind the close."""
    async with real_time(**faults) as server, speaker(server) as s:
        s.speak()
        s.speak()
        await until(lambda: server.open_handshakes > 0)
        await plugin_connections.aclose(now() + 5)
        await until(lambda: server.open_handshakes == 0 and len(s.ended) == 2)
        assert server.counts["connected"] == 0


async def test_a_connection_that_the_plugin_forgot() -> None:
    """After a frame that is not JSON older plugins leave the socket open and forget it: it is closed too."""
    async with real_time(malformed="text") as server, speaker(server) as s:
        s.speak()
        await until(lambda: server.counts["context_created"])
        # The framework tries again. By then it has the second connection: one that is cancelled while it is
        # made is cut without a close frame.
        await until(lambda: server.counts["context_created"] > 1)
        await plugin_connections.aclose(now() + 5)
        await until(lambda: server.open_connections == 0 and s.ended)
        assert all(e.detail["clean"] for e in server.events_of("connection_closed"))


async def test_a_server_that_answers_nothing() -> None:
    """The close takes no more than its time and says what it forced; the contexts were cancelled before."""
    async with real_time(closed_never=True, ignore_close=True) as server, speaker(server) as s:
        s.speak()
        await until(lambda: server.counts["text"])
        began = now()
        counts = await plugin_connections.aclose(now() + 0.5)
        assert now() - began < TIMEOUT
        assert counts["contexts"]["forced"] == counts["connections"]["forced"] == 1
        await until(lambda: server.open_connections == 0)
        kinds = [event.kind for event in server.events]
        assert kinds.index("cancel_requested") < kinds.index("context_cut")


async def test_a_plain_request_under_way() -> None:
    """A `synthesize` over HTTP ends too, and leaves no response behind."""
    async with real_time() as server, aiohttp.ClientSession() as session:
        tts = inworld.TTS(
            api_key=server.api_key,
            base_url=server.base_url,
            encoding=ENCODING,
            sample_rate=24000,
            http_session=session,
        )
        stream = tts.synthesize(LONG)
        async with asyncio.timeout(TIMEOUT):
            await stream.__anext__()
        await plugin_connections.aclose(now() + 5)
        with pytest.raises(StopAsyncIteration):
            while True:
                await stream.__anext__()


async def test_an_unknown_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without the private names is closed by its public aclose(); one that hangs or fails is left."""
    closed: list[str] = []

    class TTS:
        def __init__(self, how: str) -> None:
            self.how = how

        def stream(self) -> None: ...
        def synthesize(self, _text: str) -> None: ...
        def prewarm(self) -> None: ...

        async def aclose(self) -> None:
            if self.how == "hangs":
                while True:
                    try:
                        await asyncio.sleep(60)
                    except asyncio.CancelledError:
                        if "again" in closed:
                            raise
                        closed.append("again")
            if self.how == "fails":
                raise OSError("no")
            closed.append(self.how)

    monkeypatch.setattr(private_names, "tts_class", lambda: TTS)
    mine = PluginConnections()
    mine.attach()
    mine.attach()  # once is enough, twice is harmless
    made = [TTS("well"), TTS("fails"), TTS("hangs"), TTS("never used")]
    made[0].stream()
    made[1].synthesize("text")
    made[2].prewarm()
    began = now()
    counts = await mine.aclose(now() + 0.5)
    assert now() - began < TIMEOUT
    assert closed == ["well", "again"]
    assert counts == {"tts": {"forced": 2}}


def test_a_tts_of_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TTS that another job has begun to use is left to that one, and closed on its loop."""
    closed: list[asyncio.AbstractEventLoop] = []

    class TTS:
        def stream(self) -> None: ...

        async def aclose(self) -> None:
            closed.append(asyncio.get_running_loop())

    monkeypatch.setattr(private_names, "tts_class", lambda: TTS)
    mine, tts = PluginConnections(), TTS()
    mine.attach()

    async def use() -> None:
        tts.stream()

    async def end() -> Counts:
        return await mine.aclose(now() + 5)

    with asyncio.Runner() as one, asyncio.Runner() as two:
        one.run(use())
        two.run(use())
        one.run(end())
        assert closed == []
        two.run(end())
        assert closed == [two.get_loop()]


# -- the broker's address ----------------------------------------------------------------------------------

BROKER = {
    "LASTCALL_INWORLD_WS_URL": "ws://127.0.0.1:1/",
    "LASTCALL_INWORLD_URL": "http://127.0.0.1:1/",
    "LASTCALL_INWORLD_TOKEN": "token",
    "LASTCALL_INWORLD_KEYS": f"{digest('token', 'real')} {digest('token', 'of the user')}",
}
AT_BROKER = {"ws_url": "ws://127.0.0.1:1/", "base_url": "http://127.0.0.1:1/"}
NOT_GIVEN = object()  # as livekit-agents has one; any that is no text


@pytest.mark.parametrize("given", [{}, {"api_key": None}, {"api_key": ""}, {"api_key": NOT_GIVEN}, AT_BROKER])
def test_the_way_of_a_tts_without_a_key(given: dict[str, Any]) -> None:
    """It goes to the broker with the key of the environment, as it would to Inworld; else with the token."""
    way = way_of(given, BROKER | {"INWORLD_API_KEY": ""})
    assert way == Way(arguments={**AT_BROKER, "api_key": "token"}, is_pooled=True)
    if "" not in given.values():
        way = way_of(given, BROKER | {"INWORLD_API_KEY": "of the user\n"})
        expected = "token" if given.get("api_key") == "" else "of the user"
        assert way == Way(arguments={**AT_BROKER, "api_key": expected}, is_pooled=True)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"api_key": "real", "voice": "Dennis"}, None),
        ({"api_key": "token"}, None),
        ({**AT_BROKER, "api_key": " real "}, None),
        ({"api_key": "of another account"}, "key"),
        ({"api_key": "r\udce4al"}, "key"),
        ({"ws_url": "wss://elsewhere/"}, "url"),
        ({"ws_url": "wss://elsewhere/", "api_key": "real"}, "url"),
        ({"base_url": "https://elsewhere/"}, "url"),
        ({**AT_BROKER, "base_url": "https://elsewhere/"}, "url"),
    ],
)
def test_the_way_of_a_tts(given: dict[str, Any], reason: str | None) -> None:
    """One with another URL or account is left as it is; the token goes to the broker only."""
    way = way_of(given, BROKER)
    assert way.reason == reason and way.is_pooled == (reason is None)
    if reason is None:
        assert way.arguments == {**given, **AT_BROKER, "api_key": given["api_key"].strip()}
    else:
        assert way.arguments == given and "token" not in given.values()
    assert way_of(given, {"LASTCALL_INWORLD_TOKEN": "token"}) == Way(arguments=given)
    older = {name: value for name, value in BROKER.items() if name != "LASTCALL_INWORLD_KEYS"}
    way = way_of(given, older)
    assert way.is_pooled == (reason != "url") and (way.arguments.get("api_key") == "token") == way.is_pooled


@pytest.mark.parametrize("cls", [inworld.TTS, lastcall.inworld.TTS])
async def test_both_classes_find_the_broker(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the plugin's where there is no broker, and use it past any proxy where there is one."""
    monkeypatch.setenv("INWORLD_API_KEY", "real")
    async with aiohttp.ClientSession(proxy="http://127.0.0.1:9") as session:
        tts = cls(http_session=session, voice="Dennis")
        assert isinstance(tts, inworld.TTS)
        assert (tts._ws_url, tts._authorization) == ("wss://api.inworld.ai/", "Basic real")
        assert tts._ensure_session() is session
        for name, value in BROKER.items():
            monkeypatch.setenv(name, value)
        tts = cls(http_session=session)
        assert (tts._ws_url, tts._base_url) == ("ws://127.0.0.1:1/", "http://127.0.0.1:1/")
        assert tts._authorization == "Basic real"
        own = tts._ensure_session()
        assert own is not session and own is tts._ensure_session()
        tts = cls(api_key="of another account", http_session=session)
        assert (tts._ws_url, tts._authorization) == ("wss://api.inworld.ai/", "Basic of another account")
        assert tts._ensure_session() is session
        monkeypatch.delenv("INWORLD_API_KEY")
        assert cls()._authorization == "Basic token"
        with pytest.raises(ValueError, match="key"):
            cls(ws_url="wss://elsewhere/")
        assert plugin_connections.is_needed
        await plugin_connections.aclose(now() + 5)
        assert own.closed


def test_without_the_plugin() -> None:
    """Everything but the TTS works; that says in one line what to install."""
    code = (
        "import sys; sys.modules['livekit.plugins.inworld'] = None\n"
        "import lastcall, lastcall.worker.inworld.plugin.attached\n"
        "try:\n    lastcall.inworld.TTS\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    line = done.stdout.decode()
    assert line.startswith("lastcall.inworld.TTS needs livekit-plugins-inworld") and line.count("\n") == 1
    assert "lastcall[inworld]" in line


# -- the end of a job --------------------------------------------------------------------------------------


class Context:
    """The part of a JobContext that the end of a job reads."""

    def __init__(self) -> None:
        self.proc = Context.Process()
        self.job = SimpleNamespace(id="AJ_1")
        self.callbacks: list[Any] = []

    class Process:
        pass

    def add_shutdown_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)


class Closable:
    def __init__(self, name: str, order: list[str], *, hangs: bool = False) -> None:
        self.name, self.order, self.hangs = name, order, hangs

    async def aclose(self) -> None:
        if self.hangs:
            await asyncio.sleep(60)
        self.order.append(self.name)


async def test_closing_is_in_order_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last object is closed first. One that hangs holds up no other close. A second end does nothing."""
    monkeypatch.setattr(teardown, "JOINED_CLOSE_WITHIN", 0.1)
    order: list[str] = []

    async def ours(_deadline: float) -> Counts:
        order.append("ours")
        return {}

    ctx = Context()
    teardown.begin(ctx.proc, {"ours": ours})
    first = Closable("first", order)
    assert lastcall.closing(ctx, first) is first
    lastcall.closing(ctx, Closable("hangs", order, hangs=True))
    lastcall.closing(ctx, Closable("last", order))
    assert ctx.callbacks == []
    async with asyncio.timeout(TIMEOUT):
        await teardown.end(ctx)
        await teardown.end(ctx)
    assert order in (["last", "first", "ours"], ["last", "ours"])
    with pytest.raises(RuntimeError, match="Closable"):
        lastcall.closing(ctx, first)


async def test_closing_outside_lastcall() -> None:
    """It is a shutdown callback like any other."""
    order: list[str] = []
    ctx = Context()
    lastcall.closing(ctx, Closable("mine", order))
    await teardown.end(ctx)
    assert order == []
    for callback in ctx.callbacks:
        await callback()
    assert order == ["mine"]


@pytest.mark.parametrize("how", ["well", "fails"])
async def test_the_hook_at_the_end(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The hook runs once, only in a job, before the HTTP session is closed, which happens in any case."""
    from livekit.agents.job import _JobContextVar

    order: list[Any] = []

    async def close() -> None:
        order.append("session")

    async def end(ctx: Any) -> None:
        order.append(ctx)
        if how == "fails":
            raise OSError("no")

    http_context: Any = utils.http_context
    monkeypatch.setattr(http_context, "_close_http_ctx", close)
    job_process.at_job_end(end)
    job_process.at_job_end(end)
    await http_context._close_http_ctx()
    assert order == ["session"]
    ctx: Any = Context()
    token = _JobContextVar.set(ctx)
    try:
        await http_context._close_http_ctx()
    except OSError:
        assert how == "fails"
    finally:
        _JobContextVar.reset(token)
    assert order == ["session", ctx, "session"]
