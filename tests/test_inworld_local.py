"""The local Inworld server against the published rules, with a client of a few lines."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from lastcall.worker.local.inworld_server import Codes, Faults, InworldServer, Limits, Speech

TIMEOUT = 10.0
PATH = "tts/v1/voice:streamBidirectional"


class Client:
    """One connection, spoken by hand."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws

    async def send(self, key: str, context: str = "", **body: Any) -> None:
        frame = {key: body, **({"contextId": context} if context else {})}
        await self.ws.send_str(json.dumps(frame))

    async def receive(self) -> Any:
        """Return the next frame, decoded."""
        frame = await self.ws.receive(TIMEOUT)
        assert frame.type is aiohttp.WSMsgType.TEXT, frame
        return json.loads(frame.data)

    async def result(self) -> tuple[str, str]:
        """Return the kind and the context of the next frame; an error's kind is its code and text."""
        message = await self.receive()
        if "error" in message:
            return f"{message['error']['code']} {message['error']['message']}", ""
        result = message["result"]
        status = result["status"]
        if status["code"]:
            return f"{status['code']} {status['message']}", result["contextId"]
        return next(key for key in result if key not in ("contextId", "status")), result["contextId"]

    async def create(self, context: str, **config: Any) -> None:
        await self.send("create", context, voiceId="Ashley", autoMode=True, **config)
        assert await self.result() == ("contextCreated", context)

    async def until(self, kind: str) -> list[str]:
        """Read on until a frame of the kind; return the kinds before it."""
        seen = []
        while (each := (await self.result())[0]) != kind:
            seen.append(each)
        return seen


@asynccontextmanager
async def clients(server: InworldServer, count: int = 1) -> AsyncIterator[list[Client]]:
    async with aiohttp.ClientSession() as session:
        headers = {"Authorization": f"Basic {server.api_key}"}
        yield [
            Client(await session.ws_connect(f"{server.ws_url}{PATH}", headers=headers)) for _ in range(count)
        ]


async def refused(server: InworldServer, **headers: str) -> int:
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await session.ws_connect(f"{server.ws_url}{PATH}", headers=headers)
        return caught.value.status


async def test_one_utterance_from_create_to_close() -> None:
    """Create, text, flush and close in one burst are answered in order, and the place is free at the end."""
    async with InworldServer() as server, clients(server) as (client,):
        await client.send("create", "a", voiceId="Ashley", bufferCharThreshold=250)
        await client.send("send_text", "a", text="hello there")
        await client.send("flush_context", "a")
        await client.send("close_context", "a")
        kinds = [await client.result() for _ in range(11)]
        chunks = 8  # 11 characters at 15 a second, 100 ms each
        expected = ["contextCreated", *["audioChunk"] * chunks, "flushCompleted", "contextClosed"]
        assert kinds == [(kind, "a") for kind in expected]
        assert (server.open_contexts, server.open_connections) == (0, 1)
        await client.ws.close()
        await server.until(lambda: server.counts["connection_closed"], TIMEOUT)
    assert [event.kind for event in server.events] == [
        "connected",
        "context_created",
        "close_requested",
        "text",
        "flush",
        "context_closed",
        "connection_closed",
    ]
    assert server.events[-1].detail == {"code": 1000, "clean": True}


async def test_audio_and_word_times() -> None:
    """24 kHz 16-bit PCM, silence or a tone; times are inside audioChunk and begin at 0 in each generation."""
    async with InworldServer(speech=Speech(sound="tone")) as server, clients(server) as (client,):
        await client.create("a", timestampType="WORD", timestampTransportStrategy="ASYNC")
        for _ in range(2):
            await client.send("send_text", text="one two", flush_context={})
            chunks = []
            while "flushCompleted" not in (result := (await client.receive())["result"]):
                chunks.append(result["audioChunk"])
            sound = b"".join(base64.b64decode(chunk.get("audioContent", "")) for chunk in chunks)
            assert len(sound) == 5 * 2400 * 2 and any(sound)
            words = chunks[-1]["timestampInfo"]["wordAlignment"]
            assert "audioContent" not in chunks[-1]
            assert (words["words"], words["wordStartTimeSeconds"][0]) == (["one", "two"], 0.0)


async def test_linear16_has_a_wav_header() -> None:
    """Once for a context, in front of its first chunk."""
    async with InworldServer() as server, clients(server) as (client,):
        await client.create("a", audioConfig={"audioEncoding": "LINEAR16", "sampleRateHertz": 16000})
        sound = []
        for _ in range(2):
            await client.send("send_text", "a", text="hi")
            while "flushCompleted" not in (result := (await client.receive())["result"]):
                sound.append(base64.b64decode(result["audioChunk"]["audioContent"]))
        assert [chunk[:4] == b"RIFF" for chunk in sound] == [True, False, False, False]
        assert int.from_bytes(sound[0][24:28], "little") == 16000


async def test_real_time_speech_can_be_cancelled() -> None:
    """Close goes on speaking to the end, cancel stops at once and discards; other contexts go on."""
    async with InworldServer(speech=Speech(pace="real-time")) as server, clients(server) as (client,):
        for id in ("a", "b"):
            await client.create(id)
        for id in ("a", "b"):
            await client.send("send_text", id, text="x" * 300)
        await client.send("cancel_context", "a")
        while await client.result() != ("contextClosed", "a"):
            pass
        assert server.open_contexts == 1
        assert await client.result() == ("audioChunk", "b")


async def test_limits() -> None:
    """The sixth context, the second connection of one, and 1001 characters are refused in the known words."""
    codes = Codes(context_limit=77, text_limit=78)
    faults = Faults(codes=codes)
    async with InworldServer(limits=Limits(connections=1), faults=faults) as server:
        async with clients(server) as (client,):
            for n in range(5):
                await client.create(str(n))
            await client.send("create", "5")
            assert await client.result() == ("77 Max contexts limit reached", "5")
            await client.send("send_text", "0", text="x" * 1001)
            assert (await client.result())[0].startswith("78 ")
            authorization = f"Basic {server.api_key}"
            assert await refused(server, Authorization=authorization) == 429
            assert await refused(server, Authorization="Basic wrong") == 401
            assert (server.peak_connections, server.peak_contexts, server.open_contexts) == (1, 5, 5)
        await server.until(lambda: server.open_connections == 0, TIMEOUT)
        assert server.counts["context_cut"] == 5 and server.open_contexts == 0
        async with clients(server):
            assert server.open_connections == 1


async def test_words_of_errors() -> None:
    """Unknown contexts, frames without an id, and what is no frame at all; none of it ends the connection."""
    async with InworldServer() as server, clients(server) as (client,):
        await client.send("send_text", "x", text="hi")
        assert await client.result() == ("5 Context x not found during sendText", "x")
        await client.send("close_context", "x")
        assert await client.result() == ("5 Context x not found during closeContext", "x")
        await client.send("send_text", text="hi")
        text = "3 context_id is required when 0 contexts are open (payload=SEND_TEXT)"
        assert await client.result() == (text, "")
        await client.ws.send_str("not JSON")
        assert (await client.result())[1] == ""
        await client.create("x")
        await client.send("close_context")
        assert await client.result() == ("contextClosed", "x")


@pytest.mark.parametrize("how", ["status", "top-level"])
async def test_a_failed_create_leaves_no_context(how: Any) -> None:
    """It counts for nothing, and a later close finds nothing."""
    async with InworldServer(faults=Faults(create_error=how)) as server, clients(server) as (client,):
        await client.send("create", "a")
        expected = {"status": ("3 Invalid voice for context", "a"), "top-level": ("13 internal error", "")}
        assert await client.result() == expected[how]
        await client.send("close_context", "a")
        assert (await client.result())[0] == "5 Context a not found during closeContext"
        assert server.counts["context_created"] == 0


@pytest.mark.parametrize("ends", [True, False])
async def test_an_error_in_mid_speech(ends: bool) -> None:
    """The context is kept or ended with it, as the setting says."""
    faults = Faults(speech_error=True, error_ends_context=ends)
    async with InworldServer(faults=faults) as server, clients(server) as (client,):
        await client.create("a")
        await client.send("send_text", "a", text="hello")
        assert await client.until("13 synthesis failed") == ["audioChunk"]
        assert server.open_contexts == (0 if ends else 1)


async def test_slots_are_counted_until_the_close_is_said() -> None:
    """contextClosed late or never: the place stays taken for as long, and a create is refused meanwhile."""
    faults = Faults(closed_never=True)
    async with (
        InworldServer(limits=Limits(contexts=1), faults=faults) as server,
        clients(server) as (client,),
    ):
        await client.create("a")
        await client.send("cancel_context", "a")
        await server.until(lambda: server.counts["cancel_requested"], TIMEOUT)
        await client.send("create", "b")
        assert await client.result() == ("8 Max contexts limit reached", "b")
        assert server.open_contexts == 1
        faults.closed_never, faults.closed_delay = False, 0.05
        await client.send("cancel_context", "a")
        assert await client.result() == ("contextClosed", "a")
        faults.cancel = "ignored"
        await client.create("c")
        await client.send("cancel_context", "c")
        await client.send("close_context", "c")
        assert await client.result() == ("contextClosed", "c")


@pytest.mark.parametrize("what", ["text", "null", "list"])
async def test_malformed_frames(what: Any) -> None:
    """They come in front of contextCreated, which comes all the same."""
    async with InworldServer(faults=Faults(malformed=what)) as server, clients(server) as (client,):
        await client.send("create", "a")
        text = (await client.ws.receive(TIMEOUT)).data
        if what == "text":
            with pytest.raises(ValueError):
                json.loads(text)
        else:
            assert json.loads(text) in ({"result": None}, ["contextCreated"])
        assert await client.result() == ("contextCreated", "a")


async def test_handshakes_that_fail_hang_or_take_long() -> None:
    """Each is switched at run time; a hung one ends with its client and was never counted."""
    faults = Faults(handshake_status=500)
    async with InworldServer(faults=faults) as server:
        assert await refused(server) == 500
        faults.handshake_status, faults.handshake_hang = 0, True
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), clients(server):
                pass
        assert server.peak_connections == 0
        faults.handshake_hang, faults.handshake_cut = False, True
        with pytest.raises(aiohttp.ClientError):
            async with clients(server):
                pass
        assert server.peak_connections == 0
        faults.handshake_cut, faults.handshake_delay = False, 0.05
        async with clients(server) as (client,):
            await client.create("a")


async def test_an_unanswered_create_can_be_cancelled() -> None:
    """No contextCreated comes, its later frames wait; cancel frees the place."""
    async with InworldServer(faults=Faults(create_unanswered=True)) as server, clients(server) as (client,):
        await client.send("create", "a")
        await client.send("send_text", "a", text="hello")
        await client.send("cancel_context", "a")
        assert await client.result() == ("contextClosed", "a")
        assert server.open_contexts == 0


async def test_connections_that_end_badly() -> None:
    """Cut, idle, and a close that is never answered: each ends its contexts, the code tells which."""
    limits = Limits(idle=0.2)
    faults = Faults(idle_close_code=4001)
    async with InworldServer(limits=limits, faults=faults, seed=1) as server:
        async with clients(server) as (client,):
            await client.create("a")
            assert (await client.ws.receive(TIMEOUT)).data == 4001
        limits.idle = 600.0
        await server.until(lambda: server.counts["context_cut"] == 1, TIMEOUT)
        faults.cut_rate = 1.0
        async with clients(server) as (client,):
            await client.send("create", "b")
            assert (await client.ws.receive(TIMEOUT)).type is not aiohttp.WSMsgType.TEXT
        faults.cut_rate, faults.ignore_close = 0.0, True
        async with clients(server) as (client,):
            closing = asyncio.create_task(client.ws.close())
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await asyncio.shield(closing)
            assert server.open_connections == 1
            closing.cancel()
            await asyncio.wait([closing])
        await server.until(lambda: server.counts["connection_closed"] == 3, TIMEOUT)
        closed = [event.detail for event in server.events_of("connection_closed")]
        assert [each["code"] for each in closed] == [4001, 1006, 1000]
        assert server.open_connections == server.open_contexts == 0


async def test_a_server_that_stops_reading() -> None:
    """Nothing is taken from the client until it reads again, then everything in order."""
    async with InworldServer() as server, clients(server) as (client,):
        await client.create("a")
        server.faults.stop_reading = True
        for n in range(3):
            await client.send("send_text", "a", text="x" * (n + 1))
        with pytest.raises(TimeoutError):
            await server.until(lambda: server.counts["text"], 0.1)
        server.faults.stop_reading = False
        await server.until(lambda: server.counts["text"] == 3, TIMEOUT)
        assert [event.detail["chars"] for event in server.events_of("text")] == [1, 2, 3]


async def test_plain_http() -> None:
    """The server speaks a text, lists the voices, answers 401 without the key, and fails as a test asks."""
    async with InworldServer() as server, aiohttp.ClientSession() as session:
        url, headers = f"{server.base_url}tts/v1/voice:stream", {"Authorization": f"Basic {server.api_key}"}
        async with session.post(url, headers=headers, json={"text": "hello there"}) as answer:
            lines = [json.loads(line) async for line in answer.content]
        assert len(lines) == 8 and all(line["result"]["audioContent"] for line in lines)
        async with session.get(f"{server.base_url}tts/v1/voices", headers=headers) as answer:
            assert "Ashley" in [voice["voiceId"] for voice in (await answer.json())["voices"]]
        async with session.post(url, json={"text": "hello"}) as answer:
            assert answer.status == 401
        server.faults.http_status = 503
        async with session.get(f"{server.base_url}tts/v1/voices", headers=headers) as answer:
            assert answer.status == 503


def test_by_itself() -> None:
    """It says where it serves on one line, and ends with its standard input."""
    command = [sys.executable, "-m", "lastcall.worker.local.inworld_server", "--key", "k"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        where = json.loads(process.stdout.readline())
        assert where["ws_url"].startswith("ws://127.0.0.1:")
        assert where["environment"] == {"INWORLD_API_KEY": "k"}
        process.stdin.close()
        assert process.wait(20) == 0
