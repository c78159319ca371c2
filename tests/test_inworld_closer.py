"""Agents that use the Inworld plugin directly: what it has open is closed in order when the job ends.

Real workers under a real supervisor; what counts is what the server saw.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from lastcall.worker.local.inworld_server import Event, Faults, InworldServer, Speech
from tests.support.harness import HERE, Run, StartRun

pytestmark = pytest.mark.core

AGENT = str(HERE / "agents" / "speaker.py")
# Spoken in real time, about 40 s; a job that ends in its middle has said nearly none of it.
LONG = "This is a long sentence, and it goes on for quite a while before it comes to its end. " * 7


@asynccontextmanager
async def inworld(**options: Any) -> AsyncIterator[InworldServer]:
    async with InworldServer(speech=Speech(pace="real-time"), **options) as server:
        yield server


def environment(server: InworldServer, **more: str) -> dict[str, str]:
    root = str(HERE.parent)
    return {**server.environment, "SPEAKER_WS": server.ws_url, "PYTHONPATH": root, **more}


def by_connection(server: InworldServer) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    for event in server.events:
        found.setdefault(event.connection, []).append(event)
    return found


async def closed_in_order(server: InworldServer, r: Run, *, connections: int, contexts: int) -> None:
    """Assert what the server saw: contexts first, close frames with 1000, nothing opened afterwards."""
    await server.until(lambda: server.open_connections == 0, 10)
    assert server.counts["connected"] == connections, r.logs()
    assert server.counts["context_created"] == contexts, r.logs()
    assert server.counts["context_closed"] == contexts, (server.events, r.logs())
    assert server.counts["context_cut"] == server.counts["error"] == 0, (server.events, r.logs())
    for events in by_connection(server).values():
        last = events[-1]
        assert last.kind == "connection_closed", events
        assert last.detail == {"code": 1000, "clean": True}, (events, r.logs())
        # On each connection by itself, because one job may be over before another has begun. A connection in
        # place of a closed one would be one too many above.
        began = min(e.at for e in events if e.kind in ("cancel_requested", "connection_closed"))
        assert not [e for e in events if e.kind in ("connected", "context_created") and e.at > began]
    assert "Unclosed" not in r.logs()


async def test_jobs_that_end_by_themselves_and_a_stop_in_mid_speech(run: StartRun) -> None:
    """A job said everything; its connection is closed with a close frame, what it gave to `closing` before.

    livekit-agents goes on with the end of the job after a shutdown callback that raises: a job that has one
    is closed in order all the same.

    In a stop jobs run to their end and end in mid-speech: their contexts are cancelled, then all is closed.
    Wherever the TTS was made: at the user's module's import, in the setup function, in the entrypoint.
    """
    async with inworld() as server:
        r: Run = await run("run", "--grace", "40", AGENT, environment=environment(server))
        await r.ready()
        job = await r.dispatch(text="Good bye.")
        assert (await r.job_says(job.job_id, "silent"))["frames"] > 0
        await r.job_says(job.job_id, "extra closed")
        await closed_in_order(server, r, connections=1, contexts=1)
        what = [note["what"] for note in r.notes() if note["job"] == job.job_id]
        assert what.index("callback") < what.index("extra closed")
        over = r.directory / "over"
        raises = await r.dispatch(mode="leave", until=str(over), text=LONG, raises=True)
        await r.job_says(raises.job_id, "heard")
        over.touch()
        await r.job_says(raises.job_id, "extra closed")
        await closed_in_order(server, r, connections=2, contexts=2)
        cancelled = server.counts["cancel_requested"]

        end = r.directory / "end"
        jobs = []
        for tts in ("module", "setup", "job"):
            each = await r.dispatch(tts, mode="leave", until=str(end), streams=2, text=LONG, tts=tts)
            await r.job_says(each.job_id, "heard")
            jobs.append(each)
        r.kill_all()
        await r.until(lambda: not r.livekit.available())
        end.touch()
        assert await r.exit() == 0
        await r.clean(job, raises, *jobs)
        await closed_in_order(server, r, connections=5, contexts=8)
        assert server.counts["cancel_requested"] == cancelled + 6


@pytest.mark.alone
async def test_a_job_that_is_told_to_end(run: StartRun) -> None:
    """Cut at the deadline, but it cooperates: closed in order all the same."""
    async with inworld() as server:
        r: Run = await run("run", "--grace", "8", AGENT, environment=environment(server))
        await r.ready()
        job = await r.dispatch(mode="stay", text=LONG, streams=2)
        await r.job_says(job.job_id, "heard")
        r.kill()
        assert await r.exit() == 75
        assert r.fates() == {job.job_id: "cut"}
        await closed_in_order(server, r, connections=1, contexts=2)
        await r.nothing_left()


async def test_the_thread_executor(run: StartRun) -> None:
    """Jobs in threads of the worker: each closes the connections of its loop, and no others."""
    async with inworld() as server:
        env = environment(server, EXECUTOR="THREAD")
        r: Run = await run("run", "--grace", "40", AGENT, environment=env)
        await r.ready()
        over = r.directory / "over"
        long = await r.dispatch("long", mode="leave", until=str(over), text=LONG)
        await r.job_says(long.job_id, "heard")
        short = await r.dispatch("short", text="Good bye.")
        await r.job_says(short.job_id, "extra closed")
        await server.until(lambda: server.counts["connection_closed"] == 1, 10)
        assert (server.open_connections, server.open_contexts) == (1, 1)
        r.kill_all()
        over.touch()
        assert await r.exit() == 0
        await r.clean(long, short)
        await closed_in_order(server, r, connections=2, contexts=2)


async def test_a_server_that_ignores_cancel_and_close(run: StartRun) -> None:
    """The end of the job is bounded whatever the server does; contexts were cancelled before the close."""
    async with inworld(faults=Faults(cancel="ignored", ignore_close=True)) as server:
        r: Run = await run("run", "--grace", "40", AGENT, environment=environment(server))
        await r.ready()
        over = r.directory / "over"
        job = await r.dispatch(mode="leave", text=LONG, until=str(over))
        await r.job_says(job.job_id, "heard")
        r.kill()
        over.touch()
        assert await r.exit(20) == 0
        await r.clean(job)
        await server.until(lambda: server.open_connections == 0, 10)
        kinds = [event.kind for event in server.events]
        assert kinds.index("cancel_requested") < kinds.index("context_cut") < kinds.index("connection_closed")
        assert server.events_of("connection_closed")[0].detail["code"] == 1000
        assert "inworld connections closed" in r.logs() and "Unclosed" not in r.logs()


def broker(server: InworldServer) -> dict[str, str]:
    return environment(
        server,
        SPEAKER_WS="",
        INWORLD_API_KEY="not the token",
        LASTCALL_INWORLD_WS_URL=server.ws_url,
        LASTCALL_INWORLD_URL=server.base_url,
        LASTCALL_INWORLD_TOKEN=server.api_key,
    )


async def test_the_broker_by_its_address(run: StartRun) -> None:
    """Where the environment names a broker, a TTS without arguments uses it, made at whatever moment."""
    async with inworld() as server:
        r: Run = await run("run", "--grace", "40", AGENT, environment=broker(server))
        await r.ready()
        jobs = [await r.dispatch(tts, tts=tts, text="Good bye.") for tts in ("module", "setup", "job")]
        for job in jobs:
            assert (await r.job_says(job.job_id, "started"))["ws_url"] == server.ws_url
            assert (await r.job_says(job.job_id, "silent"))["frames"] > 0
        r.kill()
        assert await r.exit() == 0
        await r.clean(*jobs)
        await closed_in_order(server, r, connections=3, contexts=3)


async def test_a_plugin_imported_late(run: StartRun) -> None:
    """A plugin that only the entrypoint imports, after lastcall, goes to the broker and is closed too."""
    async with inworld() as server:
        env = {**broker(server), "IMPORT_LATE": "1"}
        r: Run = await run("run", "--grace", "40", AGENT, environment=env)
        await r.ready()
        over = r.directory / "over"
        job = await r.dispatch(mode="leave", text=LONG, until=str(over))
        await r.job_says(job.job_id, "heard")
        r.kill_all()
        over.touch()
        assert await r.exit() == 0
        await r.clean(job)
        await closed_in_order(server, r, connections=1, contexts=1)
