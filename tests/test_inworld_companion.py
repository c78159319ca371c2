"""The broker's process: its contract with a supervisor, and what a SIGKILL on either side does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from lastcall.worker.base.clock import now
from lastcall.worker.base.inworld_keys import digest
from lastcall.worker.base.wire import (
    BrokerBeat,
    Close,
    Key,
    Resource,
)
from lastcall.worker.inworld.broker.broker import listen
from lastcall.worker.local.inworld_server import Faults, InworldServer, Limits
from tests.support.broker import LONG, SPEAKING, TOKEN
from tests.support.companion import STOP_SIGNALS, Companion, companion
from tests.support.inworld import PATIENCE, until
from tests.support.inworld_job import Job

ROOT = Path(__file__).parent.parent


async def test_it_serves_on_the_supervisors_word_and_closes_on_it(tmp_path: Path) -> None:
    """Serving once the key has come, beats with figures, then a report that agrees with the server."""
    async with companion(tmp_path, speech=SPEAKING) as one:
        await one.serve()
        async with Job(one.ws_url, TOKEN) as job:
            for number in range(6):
                await job.burst(str(number), LONG)
                await job.said(str(number), "audioChunk")
            one.messages.clear()
            beat = await one.heard(BrokerBeat)
            assert (beat.clients, beat.connections, beat.contexts, beat.waiters) == (1, 2, 6, 0)
            assert beat.rss_bytes > 0
            one.say(Close(close_at=now() + PATIENCE))
            resource = await one.heard(Resource)
            assert await one.exit() == 0
        counts = {"connections": {"closed": 2}, "contexts": {"closed": 6}}
        assert (resource.name, resource.fate, resource.counts) == ("inworld-pool", "closed", counts)
        await until(lambda: one.server.open_connections == 0)
        assert one.server.counts["context_closed"] == 6 and not one.server.counts["context_cut"]
        ends = [event.detail for event in one.server.events_of("connection_closed")]
        assert ends == [{"code": 1000, "clean": True}] * 2


async def test_the_key_is_nowhere_but_in_its_message(tmp_path: Path) -> None:
    """Not in arguments, environment, log, or anything it says; a new key is used for the next connection."""
    async with companion(tmp_path) as one:
        await one.serve()
        proc = Path(f"/proc/{one.process.pid}")
        if os.getuid() == 0:  # only root may read the environment of a process that forbids dumps
            for name in ("environ", "cmdline"):
                assert one.server.api_key.encode() not in (proc / name).read_bytes()
        old, one.server.api_key = one.server.api_key, "another-key"
        async with Job(one.ws_url, TOKEN) as job:
            await job.burst("a", "Hello.")
            assert await job.said("a", "code") == 16
            one.say(Key(key="another-key"))
            await one.heard(BrokerBeat)
            await job.burst("b", "Hello.")
            await job.said("b", "contextClosed")
        one.say(Close(close_at=now() + 5))
        await one.exit()
        for text in (one.log.read_text(), one.received.decode()):
            assert old not in text and "another-key" not in text


async def test_signals_alone_do_not_end_it(tmp_path: Path) -> None:
    """SIGTERM and SIGINT, early and late, change nothing while it has a supervisor."""
    async with companion(tmp_path) as one:
        for number in STOP_SIGNALS:
            one.process.send_signal(number)
        await one.serve()
        for number in STOP_SIGNALS:
            one.process.send_signal(number)
        async with Job(one.ws_url, TOKEN) as job:
            await job.burst("c", "Hello.")
            await job.said("c", "contextClosed")
        one.say(Close(close_at=now() + 5))
        assert await one.exit() == 0


async def test_it_outlives_its_supervisor_until_the_last_worker(tmp_path: Path) -> None:
    """The supervisor lost, jobs go on speaking; when the lifeline ends, everything is closed in order."""
    async with companion(tmp_path) as one:
        await one.serve()
        one.lose()
        async with Job(one.ws_url, TOKEN) as job:
            one.process.send_signal(signal.SIGTERM)
            for number in range(3):
                await job.burst(str(number), "Hello.")
                await job.said(str(number), "contextClosed")
            assert one.process.poll() is None
            one.let_go()
            assert await one.exit() == 0
        assert one.server.events_of("connection_closed")[0].detail == {"code": 1000, "clean": True}


async def test_its_grace_bounds_the_life_without_a_supervisor(tmp_path: Path) -> None:
    """A lifeline that stays open keeps a broker without a supervisor alive no longer than grace."""
    async with companion(tmp_path, grace=0.3) as one:
        await one.serve()
        one.lose()
        assert await one.exit() == 0


async def test_a_server_that_never_answers_costs_its_share(tmp_path: Path) -> None:
    """Forced, named, exit code 75, and in time; a later word may only make it sooner."""
    async with companion(tmp_path, faults=Faults(closed_never=True, ignore_close=True)) as one:
        await one.serve()
        async with Job(one.ws_url, TOKEN) as job:
            await job.burst("c", "Hello.", close=False)
            await job.said("c", "contextCreated")
            one.say(Close(close_at=now() + 600))
            await until(lambda: one.server.counts["cancel_requested"] == 1)
            began = now()
            one.say(Close(close_at=now() + 0.5))
            resource = await one.heard(Resource)
            assert resource.fate == "forced"
            assert resource.counts == {"connections": {"forced": 1}, "contexts": {"forced": 1}}
            assert await one.exit() == 75
            assert now() - began < PATIENCE


async def test_a_lookup_that_hangs_delays_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends when its pool is closed, while the system still looks for the name of the server."""
    aliases = tmp_path / "aliases"
    os.mkfifo(aliases)  # the C library reads it for a name without a dot, and waits for what never comes
    monkeypatch.setenv("HOSTALIASES", str(aliases))
    writer = -1

    def hangs() -> bool:
        nonlocal writer
        try:
            writer = os.open(aliases, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False
        return True

    try:
        async with companion(tmp_path, ws_url="ws://nowhere/") as one:
            await one.serve()
            async with Job(one.ws_url, TOKEN) as job:
                await job.burst("c", "Hello.")
                await until(hangs)
                one.say(Close(close_at=now() + 0.5))
                assert (await one.heard(Resource)).fate == "closed"
                assert await one.exit() == 0
    finally:
        if writer >= 0:
            os.close(writer)


async def test_told_to_close_before_it_served(tmp_path: Path) -> None:
    """Without a key there is nothing to close, and nothing is wrong."""
    async with companion(tmp_path) as one:
        one.say(Close(close_at=now() + 1))
        assert await one.exit() == 0


async def test_a_killed_broker_is_replaced_on_the_same_socket(tmp_path: Path) -> None:
    """Its speech is lost. A new process takes the socket, and serves a job that connected in between."""
    async with InworldServer(speech=SPEAKING) as server:
        with listen() as listener:
            first = Companion(server, listener, tmp_path / "log")
            second = None
            try:
                await first.serve()
                async with Job(first.ws_url, TOKEN) as job:
                    await job.burst("c", LONG)
                    await job.said("c", "audioChunk")
                    first.process.kill()
                    await until(lambda: job.close_code is not None)
                await until(lambda: server.open_connections == 0)
                between = Job(first.ws_url, TOKEN)
                connecting = asyncio.ensure_future(between.__aenter__())
                second = Companion(server, listener, tmp_path / "log")
                await second.serve()
                assert second.ws_url == first.ws_url
                await connecting
                await between.burst("c", "Hello.")
                await between.said("c", "contextClosed")
                await between.__aexit__()
                second.say(Close(close_at=now() + 5))
                assert await second.exit() == 0
            finally:
                for one in (first, second):
                    if one is not None:
                        one.end()


async def test_the_socket_outlives_an_orderly_end_too(tmp_path: Path) -> None:
    """A broker that was told to close leaves the supervisor's socket as it was; the next one serves on it."""
    async with InworldServer() as server:
        with listen() as listener:
            for _ in range(2):
                one = Companion(server, listener, tmp_path / "log")
                try:
                    await one.serve()
                    async with Job(one.ws_url, TOKEN) as job:
                        await job.burst("c", "Hello.")
                        await job.said("c", "contextClosed")
                    one.say(Close(close_at=now() + 5))
                    assert await one.exit() == 0
                finally:
                    one.end()


async def test_a_killed_job_is_cancelled_upstream(tmp_path: Path) -> None:
    """SIGKILLed in mid-speech, its contexts are cancelled at the server, in a fraction of a second."""
    async with companion(tmp_path, speech=SPEAKING) as one:
        await one.serve()
        command = [sys.executable, "-m", "tests.support.inworld_job", one.ws_url, TOKEN, "1", "6", "hang"]
        job = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
        try:
            assert job.stdout is not None
            async with asyncio.timeout(60):
                assert await job.stdout.readline() == b"speaking\n"
            assert one.server.open_contexts == 6
            killed = now()
            job.kill()
            await until(lambda: one.server.counts["cancel_requested"] == 6)
            # 0.2 s is the promise; ten times that is for a machine that is busy with something else.
            assert one.server.events_of("cancel_requested")[-1].at - killed < 2.0
            await until(lambda: one.server.open_contexts == 0)
            assert one.server.counts["context_cut"] == 0
        finally:
            if job.returncode is None:
                job.kill()
            await job.wait()


async def test_thirty_jobs_with_four_streams_each(tmp_path: Path) -> None:
    """30 processes speak 120 streams to the end, on at most 20 connections with at most 5 contexts each."""
    async with companion(tmp_path, limits=Limits(connections=20, contexts=5)) as one:
        await one.serve()
        command = [sys.executable, "-m", "tests.support.inworld_job", one.ws_url, TOKEN, "30", "4", "3"]
        jobs = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
        async with asyncio.timeout(90):
            assert await jobs.wait() == 0
        server = one.server
        # On a busy machine a slow create may go out twice: 5 % of them at most, and one.
        assert 360 <= server.counts["context_created"] == server.counts["context_closed"] <= 360 * 1.05 + 1
        assert server.peak_connections <= 20 and server.peak_contexts <= 5
        assert not server.events_of("refused") and not server.events_of("context_refused")
        one.say(Close(close_at=now() + 5))
        assert await one.exit() == 0


async def test_alone_it_says_where_and_ends_on_sigterm() -> None:
    """Without a supervisor: one line of JSON with what a job needs, and an orderly end on SIGTERM."""
    async with InworldServer() as server:
        urls = ["--ws-url", server.ws_url, "--base-url", server.base_url]
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "lastcall.worker.inworld", *urls],
            cwd=ROOT,
            env={**os.environ, "INWORLD_API_KEY": server.api_key},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(30):
                where = json.loads(await process.stdout.readline())
            assert server.api_key not in json.dumps(where) and "INWORLD_API_KEY" not in where["environment"]
            token = where["environment"]["LASTCALL_INWORLD_TOKEN"]
            assert where["environment"]["LASTCALL_INWORLD_KEYS"] == digest(token, server.api_key)
            async with Job(where["environment"]["LASTCALL_INWORLD_WS_URL"], token) as job:
                await job.burst("c", "Hello.")
                await job.said("c", "contextClosed")
            headers = {"Authorization": f"Basic {token}"}
            async with (
                aiohttp.ClientSession(where["base_url"], headers=headers) as session,
                session.get("/tts/v1/voices") as answer,
            ):
                assert answer.status == 200
            process.terminate()
            async with asyncio.timeout(30):
                assert await process.wait() == 0
            assert server.events_of("connection_closed")[0].detail == {"code": 1000, "clean": True}
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "text"),
    [
        ([], {"INWORLD_API_KEY": ""}, 78, "INWORLD_API_KEY is not set"),
        (["--nonsense"], {"INWORLD_API_KEY": "k"}, 2, "--nonsense"),
        (["--ws-url", "wss://u:p@h/"], {"INWORLD_API_KEY": "k"}, 2, "--ws-url: expected wss://HOST/ without"),
        ([], {"INWORLD_API_KEY": "k\ney"}, 78, "INWORLD_API_KEY: got a space, a line break"),
    ],
)
def test_alone_wrong_use_is_one_line(
    arguments: list[str], environment: dict[str, str], code: int, text: str
) -> None:
    """It says what is missing, and what to do."""
    result = subprocess.run(
        [sys.executable, "-m", "lastcall.worker.inworld", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == code
    assert text in result.stderr.splitlines()[-1]
