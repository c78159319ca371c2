"""The broker, in this process: Inworld's protocol on loopback, one pool behind it."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from lastcall.worker.inworld.broker.broker import MAX_BODY, Broker
from lastcall.worker.inworld.plugin.arguments import DIRECT_PATH
from lastcall.worker.local.inworld_server import Faults, Limits, Speech
from tests.support.broker import LONG, SPEAKING, TOKEN, brokered
from tests.support.inworld import PATIENCE, quick, until
from tests.support.inworld_job import CONFIG, PATH

CREATED_TO_CLOSED = ["contextCreated", "audioChunk", "flushCompleted", "contextClosed"]


async def test_a_burst_is_spoken_under_the_jobs_own_id() -> None:
    """create, text, flush and close in one burst come out in order; equal ids of two jobs do not meet."""
    async with brokered() as s, s.job() as one, s.job() as two:
        for _ in range(3):
            await asyncio.gather(one.burst("same", "Hello."), two.burst("same", "Good bye, then."))
            for job in (one, two):
                await job.said("same", "contextClosed")
                assert job.kinds("same") == CREATED_TO_CLOSED, job.results
            sizes = [sum("audioChunk" in result for result in job.results["same"]) for job in (one, two)]
            assert sizes == [4, 10]
            one.results.clear()
            two.results.clear()
        assert s.pair.server.counts["connected"] == 1
    s.pair.orderly()


async def test_audio_is_passed_on_byte_by_byte() -> None:
    """Frames are as the server sent them but for the id; no module of the broker decodes base64."""
    speech = Speech(sound="tone")
    async with brokered(speech=speech) as s, s.job() as job:
        await job.burst("c", "Hello.")
        await job.said("c", "contextClosed")
        audio = [r["audioChunk"]["audioContent"] for r in job.results["c"] if "audioChunk" in r]
        assert audio == list(speech.chunks("Hello.", 24000))
    for path in Path(sys.modules[Broker.__module__].__file__ or "").parent.glob("*.py"):
        assert "import base64" not in path.read_text(), path


@pytest.mark.parametrize("token", ["", "wrong", "wr\udcffng"])
async def test_without_the_token_nothing_is_served(token: str) -> None:
    """A wrong or missing key gets 401, on every path; token and real key may also come in the query."""
    async with brokered() as s, aiohttp.ClientSession(s.broker.base_url) as session:
        headers = {"Authorization": f"Basic {token}"} if token else {}
        paths = (
            ("GET", PATH),
            ("POST", "/tts/v1/voice:stream"),
            ("GET", "/tts/v1/voices"),
            ("POST", DIRECT_PATH),
        )
        for method, path in paths:
            async with session.request(method, path, headers=headers) as answer:
                assert answer.status == 401
                assert "token" in (await answer.json())["message"]
        for key in (TOKEN, s.pair.server.api_key):
            async with session.get("/tts/v1/voices", params={"authorization": f"Basic {key}"}) as answer:
                assert answer.status == 200
        assert s.pair.server.events == [] and s.broker.direct == 0


async def test_requests_that_make_no_sense_are_answered() -> None:
    """Each gets an error as Inworld gives it, and the connection goes on."""
    async with brokered() as s, s.job() as job:
        await job.ws.send_str("this is not JSON")
        await job.said(None, "code")
        await job.ws.send_bytes(b"\\x00")
        await job.send(None, send_text={"text": "whose?"})
        await until(lambda: len(job.errors) == 3)
        assert "0 contexts are open" in job.errors[2]["message"]
        await job.send("ghost", send_text={"text": "boo"})
        assert await job.said("ghost", "code") == 5
        await job.send("c", create=CONFIG)
        await job.said("c", "contextCreated")
        await job.send("c", create=CONFIG)
        assert await job.said("c", "code") == 6
        await job.send(None, send_text={"text": "Hello."})
        await job.send(None, close_context={})
        await job.said("c", "contextClosed")
        assert "audioChunk" in job.kinds("c")


async def test_an_error_of_the_server_is_the_jobs() -> None:
    """Its code and text come through, and the place is free."""
    async with brokered(faults=Faults(create_error="status")) as s, s.job() as job:
        await job.burst("c", "Hello.")
        assert await job.said("c", "code") == 3
        s.pair.server.faults.create_error = ""
        await job.burst("d", "Hello.")
        await job.said("d", "contextClosed")


async def test_a_job_that_goes_away_has_its_contexts_cancelled() -> None:
    """At the end of a local connection the server is told to stop each of its contexts, and no other."""
    async with brokered(speech=SPEAKING) as s, s.job() as other:
        await other.burst("c", LONG, close=False)
        await other.said("c", "audioChunk")
        async with s.job() as job:
            for number in range(6):
                await job.burst(f"c{number}", LONG)
                await job.said(f"c{number}", "audioChunk")
        await until(lambda: s.pair.server.open_contexts == 1)
        assert s.pair.server.counts["cancel_requested"] == 6
        await other.send("c", cancel_context={})
        await other.said("c", "contextClosed")
    s.pair.orderly()


async def test_no_request_of_a_job_is_a_fault() -> None:
    """No upgrade is 400 and a body that is too large 413; a job may go away during the upgrade."""
    headers = {"Authorization": f"Basic {TOKEN}"}
    async with brokered() as s, aiohttp.ClientSession(s.broker.base_url, headers=headers) as session:
        async with session.get(PATH) as answer:
            assert answer.status == 400
        async with session.post("/tts/v1/voice:stream", data=io.BytesIO(b"x" * (MAX_BODY + 1))) as answer:
            assert answer.status == 413
        # Away in mid-upgrade: the transport is gone when the answer is to be written.
        with pytest.MonkeyPatch.context() as patch:
            real = web.WebSocketResponse.prepare
            upgrades = 0

            async def cut(self: web.WebSocketResponse, request: web.BaseRequest) -> object:
                nonlocal upgrades
                upgrades += 1
                assert request.transport is not None
                request.transport.abort()
                return await real(self, request)

            patch.setattr(web.WebSocketResponse, "prepare", cut)
            with pytest.raises(aiohttp.ClientError):
                await session.ws_connect(PATH)
            await until(lambda: upgrades and not s.broker.clients)
        assert s.pair.pool.figures.faults == 0


async def test_a_create_waits_its_turn() -> None:
    """Over one place, utterances of two jobs are spoken in the order of their creates."""
    async with brokered(max_connections=1, max_contexts=1) as s, s.job() as one, s.job() as two:
        await one.send("0", create=CONFIG)
        await one.said("0", "contextCreated")
        for number, job in enumerate((one, two, two, one, two, one), 1):
            await job.burst(str(number), "Hello.")
            await until(lambda n=number: s.pair.pool.figures.waiters == n)  # type: ignore[misc]  # mypy can't infer it
        await one.send("0", close_context={})
        for number, job in enumerate((one, two, two, one, two, one), 1):
            await job.said(str(number), "contextClosed")
            assert job.kinds(str(number)) == CREATED_TO_CLOSED
        created = [event.at for event in s.pair.server.events_of("context_created")]
        assert len(created) == 7 and not s.pair.server.events_of("context_refused")


async def test_a_create_that_waits_too_long_gets_code_8() -> None:
    """The code that every plugin version retries; its burst is dropped, later utterances are not."""
    async with brokered(max_connections=1, max_contexts=1, acquire_timeout=1.0) as s, s.job() as job:
        await job.send("a", create=CONFIG)
        await job.said("a", "contextCreated")
        await job.burst("b", "Hello.")
        assert await job.said("b", "code") == 8
        await job.send("a", close_context={})
        await job.said("a", "contextClosed")
        await job.burst("c", "Hello.")
        await job.said("c", "contextClosed")
        assert s.pair.server.counts["context_created"] == 2


@pytest.mark.parametrize("how", ["cancel", "second close", "end"])
async def test_what_ends_a_waiting_create(how: str) -> None:
    """A cancel, a second close, or the end of its connection ends it at once; its first close does not."""
    async with brokered(max_connections=1, max_contexts=1) as s, s.job() as job:
        await job.send("a", create=CONFIG)
        await job.said("a", "contextCreated")
        async with s.job() as waiting:
            await waiting.burst("b", "Hello.")
            await until(lambda: s.pair.pool.figures.waiters == 1)
            if how != "end":
                await waiting.send("b", **{"cancel_context" if how == "cancel" else "close_context": {}})
                await waiting.said("b", "contextClosed")
                assert waiting.kinds("b") == ["contextClosed"]
        await until(lambda: s.pair.pool.figures.waiters == 0)
        await job.send("a", close_context={})
        await job.said("a", "contextClosed")
        assert s.pair.server.counts["context_created"] == 1


async def test_a_job_that_does_not_read_is_told() -> None:
    """Past its bound, unread audio is dropped, its contexts are cancelled with code 8; other jobs go on."""
    async with (
        brokered(max_unread=200_000, speech=Speech(chars_per_second=1.0)) as s,
        s.job() as slow,
        s.job() as job,
    ):
        response: Any = slow.ws._response  # no public way leads to the transport
        response.connection.transport.pause_reading()
        for number in range(3):
            # More than the buffers of the system take, by far.
            await slow.burst(f"c{number}", "x" * 900, close=False)
        await until(lambda: s.pair.server.counts["cancel_requested"] == 3)
        await job.burst("c", "x")
        await job.said("c", "contextClosed")
        response.connection.transport.resume_reading()
        for number in range(3):
            assert await slow.said(f"c{number}", "code") == 8
        await slow.burst("again", "x")
        await slow.said("again", "contextClosed")


async def test_a_lost_connection_is_told_and_the_next_utterance_succeeds() -> None:
    """Contexts of a cut connection end with code 14; what comes next is spoken."""
    async with brokered(speech=SPEAKING) as s, s.job() as job:
        await job.burst("a", LONG)
        await job.said("a", "audioChunk")
        s.pair.server.cut_connections()
        assert await job.said("a", "code") == 14
        await job.burst("b", "Hello.")
        await job.said("b", "contextClosed")


async def test_http_calls_are_passed_on() -> None:
    """voices and voice:stream are passed on, an error's status and body too, and the key is not."""
    headers = {"Authorization": f"Basic {TOKEN}"}
    async with brokered() as s, aiohttp.ClientSession(s.broker.base_url, headers=headers) as session:
        async with session.get("/tts/v1/voices", params={"filter": "language=en"}) as answer:
            assert [voice["voiceId"] for voice in (await answer.json())["voices"]]
        body = {"text": "Hello.", "voiceId": "Ashley", "audioConfig": {"sampleRateHertz": 24000}}
        async with session.post("/tts/v1/voice:stream", json=body) as answer:
            lines = [json.loads(line) async for line in answer.content]
            assert answer.status == 200 and len(lines) == 4
            assert s.pair.server.api_key not in str(answer.headers)
        s.pair.server.faults.http_status = 429
        async with session.post("/tts/v1/voice:stream", json=body) as answer:
            assert (answer.status, (await answer.json())["message"]) == (429, "refused")
        async with session.get("/tts/v1/elsewhere") as answer:
            assert answer.status == 404
        s.broker._pass.base_url = "http://127.0.0.1:9/"
        async with session.get("/tts/v1/voices") as answer:
            assert answer.status == 502
            assert s.pair.server.api_key not in await answer.text()


async def test_the_close_is_told_to_jobs_and_server() -> None:
    """Waiting creates are refused, contexts are cancelled before the connection closes, and jobs are told."""
    async with (
        brokered(speech=SPEAKING, max_connections=1, max_contexts=2, timings=quick(aclose=PATIENCE)) as s,
        s.job() as job,
    ):
        for name in ("a", "b"):
            await job.burst(name, LONG)
            await job.said(name, "audioChunk")
        await job.burst("c", LONG)
        await until(lambda: s.pair.pool.figures.waiters == 1)
        report = await s.broker.aclose()
        assert (report.connections, report.contexts) == ({"closed": 1}, {"closed": 2})
        for name in ("a", "b", "c"):
            assert await job.said(name, "code") == 14
        await until(lambda: job.close_code == 1001)
    s.pair.orderly()


async def test_limits_hold_for_many_jobs() -> None:
    """40 connections with 10 contexts each, over 20 x 5: all are spoken, none is refused upstream."""
    # Each is there for a second: long enough that all places are taken at once, on a busy machine too.
    limits, speech = Limits(connections=20, contexts=5), Speech(first_delay=1.0)
    async with brokered(limits=limits, speech=speech) as s:

        async def live() -> None:
            async with s.job() as job:
                for number in range(10):
                    await job.burst(str(number), "Hello.")
                for number in range(10):
                    await job.said(str(number), "contextClosed", 60.0)

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(40):
                group.create_task(live())
        server = s.pair.server
        assert (server.peak_connections, server.peak_contexts) == (20, 5)
        assert not server.events_of("refused") and not server.events_of("context_refused")
        assert server.counts["context_created"] == 400
    s.pair.orderly()
