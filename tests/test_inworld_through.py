"""The unmodified plugin, of whichever version is installed, through the broker."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from livekit.agents import APIConnectOptions, APIError
from livekit.agents.tts import FallbackAdapter
from livekit.plugins import inworld

from lastcall.worker.base.clock import now
from lastcall.worker.base.wire import Close
from lastcall.worker.inworld.broker.broker import listen
from lastcall.worker.inworld.pool.timings import Timings
from lastcall.worker.local.inworld_server import InworldServer, Speech
from tests.support.broker import TOKEN, Setting, brokered
from tests.support.companion import Companion
from tests.support.inworld import PATIENCE, until

pytestmark = pytest.mark.core
OPTIONS = APIConnectOptions(max_retry=3, retry_interval=0.1, timeout=5.0)


def plugin(s: Setting, session: aiohttp.ClientSession) -> inworld.TTS:
    return inworld.TTS(
        api_key=TOKEN,
        ws_url=s.broker.ws_url,
        base_url=s.broker.base_url,
        http_session=session,
        encoding="LINEAR16",
    )


async def speak(tts: inworld.TTS, text: str) -> float:
    """Return how many seconds of audio the plugin gives for a text."""
    seconds = 0.0
    async with asyncio.timeout(PATIENCE), tts.stream(conn_options=OPTIONS) as stream:
        stream.push_text(text)
        stream.end_input()
        async for audio in stream:
            seconds += audio.frame.duration
    return seconds


async def test_it_speaks() -> None:
    """Twelve utterances at once from three TTS objects: all are heard, over shared connections."""
    async with brokered(is_alone=False) as s, aiohttp.ClientSession() as session:
        objects = [plugin(s, session) for _ in range(3)]
        text = "Good morning, what can I do for you today?"
        heard = await asyncio.gather(*(speak(objects[number % 3], text) for number in range(12)))
        assert all(seconds >= 2.0 for seconds in heard), heard
        assert s.pair.server.peak_connections <= 3
        assert s.pair.server.counts["context_created"] == 12
        for tts in objects:
            await tts.aclose()
        await s.pair.settled()
    s.pair.orderly()


async def test_its_plain_calls_are_answered() -> None:
    """synthesize and list_voices, by the same URLs and token."""
    async with brokered(is_alone=False) as s, aiohttp.ClientSession() as session:
        tts = plugin(s, session)
        frames = [audio.frame async for audio in tts.synthesize("Hello there.", conn_options=OPTIONS)]
        assert sum(frame.duration for frame in frames) > 0
        assert await tts.list_voices()
        await tts.aclose()


async def test_a_stream_that_it_gives_up_frees_its_place() -> None:
    """Interrupted and closed in mid-speech, nothing of the job stays open at the server."""
    async with (
        brokered(is_alone=False, speech=Speech(pace="real-time")) as s,
        aiohttp.ClientSession() as session,
    ):
        tts = plugin(s, session)
        stream = tts.stream(conn_options=OPTIONS)
        stream.push_text("This goes on and on, sentence after sentence. " * 20)
        stream.end_input()
        async with asyncio.timeout(PATIENCE):
            await anext(aiter(stream))
            await stream.aclose()
            await tts.aclose()
        await until(lambda: not s.broker.clients)
        await s.pair.settled()
    s.pair.orderly()


async def heard(tts: inworld.TTS, speaking: asyncio.Future[float]) -> float:
    """Return what was heard. 1.3 tries again without the text: there the utterance after that counts."""
    try:
        return await speaking
    except APIError:
        if not inworld.__version__.startswith("1.3."):
            raise
        return await speak(tts, "Good morning, for the third time.")


async def test_it_speaks_through_the_next_broker(tmp_path: Path) -> None:
    """The broker SIGKILLed and replaced, the same TTS object's next utterance is heard."""
    async with InworldServer() as server:
        with listen() as listener:
            first = Companion(server, listener, tmp_path / "log")
            second = None
            try:
                await first.serve()
                async with aiohttp.ClientSession() as session:
                    url = first.ws_url
                    tts = inworld.TTS(api_key=TOKEN, ws_url=url, http_session=session, encoding="LINEAR16")
                    assert await speak(tts, "Good morning.") > 0
                    first.process.kill()
                    await first.exit()
                    speaking = asyncio.ensure_future(speak(tts, "Good morning, once more."))
                    second = Companion(server, listener, tmp_path / "log")
                    await second.serve()
                    assert await heard(tts, speaking) > 0
                    await tts.aclose()
                second.say(Close(close_at=now() + 5))
                assert await second.exit() == 0
            finally:
                for one in (first, second):
                    if one is not None:
                        one.end()


async def first_audio(tts: inworld.TTS, backup: inworld.TTS) -> float:
    """Return the seconds until livekit's FallbackAdapter has audio, from whichever of the two."""
    adapter = FallbackAdapter([tts, backup])
    began = now()
    async with asyncio.timeout(PATIENCE), adapter.stream() as stream:
        stream.push_text("Good morning.")
        stream.end_input()
        await anext(aiter(stream))
        seconds = now() - began
    await adapter.aclose()
    return seconds


@pytest.mark.parametrize("outage", ["nobody listens", "refused"])
async def test_a_fallback_speaks_about_as_soon_as_without_the_broker(outage: str) -> None:
    """With Inworld down, the adapter gives up on the plugin after the retries, and no later."""
    async with (
        InworldServer() as other,
        brokered(is_alone=False, timings=Timings(), acquire_timeout=600.0) as s,
        aiohttp.ClientSession() as session,
    ):
        down = s.pair.server.ws_url if outage == "refused" else "ws://127.0.0.1:9/"
        s.pair.pool._connections.url = down
        s.pair.server.faults.handshake_status = 503
        direct = inworld.TTS(api_key="any", ws_url=down, http_session=session, encoding="LINEAR16")
        backup = inworld.TTS(
            api_key=other.api_key, ws_url=other.ws_url, http_session=session, encoding="LINEAR16"
        )
        tts = plugin(s, session)
        # Together, so that a busy machine slows both. Versions before 1.8.9 do not retry without the broker,
        # and the adapter retries twice, after 0.1 s and after 2 s.
        without, through = await asyncio.gather(first_audio(direct, backup), first_audio(tts, backup))
        assert through < without + 2.1 + 5.0, (without, through)
        assert 1 <= s.pair.pool.figures.failed_dials <= 4
        for each in (direct, tts, backup):
            await each.aclose()
