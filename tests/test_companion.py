"""The Inworld pool beside the workers: an unmodified agent, one pool, closed to the last context."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from lastcall.worker.base import variables
from lastcall.worker.job.session import VERSION
from lastcall.worker.local.inworld_server import Faults, InworldServer, Speech
from tests.support.harness import HERE, Run, StartRun, lives
from tests.support.inworld_job import Job
from tests.support.program import Program, status, status_when, ups, verb

SPEAKER = str(HERE / "agents" / "speaker.py")
KEY = "the-real-key-of-the-account"
LONG = "This sentence is one of many that a patient agent says to a caller who listens. " * 12
# Speech that lasts as long as it takes to say. livekit-agents before 1.5 fails at WAV of which the next chunk
# comes no sooner than the last one ends (tts/tts.py, `_send_audio`). There all that a call says is one chunk.
SPOKEN = Speech(pace="real-time", chunk_ms=100 if VERSION >= (1, 5) else 4000)


def configure(directory: Path, server: InworldServer, **more: Any) -> str:
    path = directory / "lastcall.toml"
    lines = ["[inworld]", "enabled = true", f'ws_url = "{server.ws_url}"', f'base_url = "{server.base_url}"']
    lines += [f"{name} = {value}" for name, value in more.items()]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


async def start(run: StartRun, directory: Path, server: InworldServer, *arguments: str) -> Run:
    path = configure(directory, server)
    environment = {"INWORLD_API_KEY": KEY, "LASTCALL_STOP__COMPANION": "3"}
    r: Run = await run("run", "--config", path, *arguments, SPEAKER, environment=environment)
    return r


def metrics(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def companion(r: Run) -> psutil.Process:
    """Return the broker's process."""
    (found,) = [p for p in psutil.Process(r.pid).children() if "lastcall.worker.inworld" in p.cmdline()]
    return found


def resource(r: Run) -> dict[str, Any]:
    (found,) = [each for each in r.receipt()["resources"] if each["name"] == "inworld-pool"]
    return dict(found)


def closed_in_order(server: InworldServer) -> None:
    """Assert what the server saw: no context went with its connection, every connection had its frame."""
    kinds = [event.kind for event in server.events]
    assert "context_cut" not in kinds, server.events
    closes = [event.detail for event in server.events if event.kind == "connection_closed"]
    assert closes and all(detail["code"] == 1000 for detail in closes), closes
    assert server.open_connections == server.open_contexts == 0


@pytest.mark.core
async def test_an_unmodified_agent_speaks_through_the_pool(run: StartRun, tmp_path: Path) -> None:
    """`inworld.TTS()` is all an agent needs. Jobs share connections, and receipt and server agree.

    Another broker has taken the place of one that was killed, on the same port and with the same key.
    """
    async with InworldServer(api_key=KEY) as server:
        r = await start(run, tmp_path, server, "-w", "2", "--grace", "60")
        await r.ready(2)
        broker = companion(r)
        broker.kill()
        jobs = [await r.dispatch(f"room-{n}", mode="say", streams=2) for n in range(3)]
        for job in jobs:
            await r.job_says(job.job_id, "ended", 30)
        assert all("127.0.0.1" in note["ws_url"] for note in r.notes() if note["what"] == "started")
        assert companion(r).pid != broker.pid
        assert len(r.log("companion ready")) == 2
        document = await status(r)
        (pool,) = document["companions"]
        assert (pool["name"], pool["state"]) == ("inworld-pool", "ready")
        r.kill_all()
        assert await r.exit() == 0
        await r.clean(*jobs)
        closed_in_order(server)
        found = resource(r)
        assert found["fate"] == "closed"
        opened = sum(event.kind == "connected" for event in server.events)
        created = sum(event.kind == "context_created" for event in server.events)
        assert created >= 6 and opened <= 3
        assert server.peak_contexts <= 5


async def test_job_killed_and_sigterm_in_mid_speech(run: StartRun, tmp_path: Path) -> None:
    """SIGKILL of a job: its contexts are cancelled upstream, and the others go on.

    In a stop a call goes on speaking to its end, through a pool that outlives the workers' fence.
    """
    async with InworldServer(api_key=KEY, speech=SPOKEN) as server:
        r = await start(run, tmp_path, server, "--grace", "60")
        await r.ready()
        killed = await r.dispatch("killed", mode="leave", text=LONG, until=str(tmp_path / "never"))
        note = await r.job_says(killed.job_id, "heard", 30)
        psutil.Process(note["pid"]).kill()
        await r.until(lambda: server.open_contexts == 0, 5)
        assert [event.kind for event in server.events].count("cancel_requested") == 1
        job = await r.dispatch(mode="say", text="Good day. " * 4)
        await r.job_says(job.job_id, "heard", 30)
        r.kill_all()
        assert await r.exit(60) == 0
        await r.clean(job)
        heard = [note["frames"] for note in r.notes() if note["what"] == "silent"]
        assert heard and heard[0] > 1
        closed_in_order(server)
        assert resource(r)["fate"] == "closed"


@pytest.mark.alone
async def test_deadline_in_mid_speech(run: StartRun, tmp_path: Path) -> None:
    """A job that is cut has its contexts cancelled before their connection is closed."""
    async with InworldServer(api_key=KEY, speech=Speech(pace="real-time")) as server:
        r = await start(run, tmp_path, server, "--grace", "8")
        await r.ready()
        job = await r.dispatch(mode="leave", text=LONG, until=str(tmp_path / "never"))
        await r.job_says(job.job_id, "heard", 30)
        r.kill_all()
        assert await r.exit() == 75
        closed_in_order(server)
        assert r.fates() == {job.job_id: "cut"}
        assert resource(r)["fate"] == "closed"
        assert r.receipt()["seconds"] <= 8.5
        await r.nothing_left()


async def test_supervisor_killed_in_mid_speech(run: StartRun, tmp_path: Path) -> None:
    """The broker serves on until the last worker is gone, then closes in order by itself."""
    async with InworldServer(api_key=KEY, speech=SPOKEN) as server:
        r = await start(run, tmp_path, server, "--grace", "60")
        await r.ready()
        broker = companion(r).pid
        job = await r.dispatch(mode="say", text="Good day. " * 4)
        await r.job_says(job.job_id, "heard", 30)
        r.kill(signal.SIGKILL)
        await r.job_says(job.job_id, "ended", 30)
        await r.until(lambda: not lives(broker), 20)
        closed_in_order(server)
        await r.nothing_left(10)


async def test_broker_killed_in_a_stop(run: StartRun, tmp_path: Path) -> None:
    """The receipt says `forced` for the killed broker, and `closed` for the broker that took its place."""
    async with InworldServer(api_key=KEY, speech=Speech(pace="real-time")) as server:
        r = await start(run, tmp_path, server, "--grace", "60")
        await r.ready()
        job = await r.dispatch(mode="leave", text=LONG, until=str(tmp_path / "go"))
        await r.job_says(job.job_id, "heard", 30)
        await r.until(lambda: server.open_contexts == 1)
        pid = companion(r).pid
        r.kill()
        await r.until(lambda: r.log("stop draining"))
        os.kill(pid, signal.SIGKILL)
        await r.until(lambda: len(r.log("companion ready")) == 2)
        (tmp_path / "go").touch()
        assert await r.exit() == 75
        fates = [each["fate"] for each in r.receipt()["resources"] if each["name"] == "inworld-pool"]
        assert fates == ["forced", "closed"]
        assert r.fates() == {job.job_id: "finished"}
        await r.nothing_left()


@pytest.mark.alone
async def test_short_grace_while_the_broker_starts(run: StartRun, tmp_path: Path) -> None:
    """Its share may be shorter than its start takes: nothing was open, so nothing was forced."""
    async with InworldServer(api_key=KEY) as server:
        r = await start(run, tmp_path, server, "--grace", "4")
        await r.until(lambda: r.log("companion starting"))
        r.kill()
        assert await r.exit() == 0
        assert resource(r)["fate"] == "closed" and r.receipt()["killed"] == []
        await r.nothing_left()


async def test_server_that_never_answers(run: StartRun, tmp_path: Path) -> None:
    """The close costs no more than its share, and is called forced."""
    async with InworldServer(api_key=KEY, faults=Faults(ignore_close=True)) as server:
        r = await start(run, tmp_path, server, "--grace", "60")
        await r.ready()
        job = await r.dispatch(mode="say")
        await r.job_says(job.job_id, "ended", 30)
        await r.until(lambda: r.livekit.jobs[job.job_id].status == "JS_SUCCESS")
        r.kill()
        assert await r.exit() == 75
        receipt = r.receipt()
        assert (receipt["outcome"], resource(r)["fate"]) == ("forced", "forced")
        assert receipt["seconds"] < 10
        await r.nothing_left()


@pytest.mark.core
async def test_the_key_of_a_file_is_nowhere(run: StartRun, tmp_path: Path) -> None:
    """Not in a log, the status, an argument, or the environment of any child; jobs speak all the same."""
    async with InworldServer(api_key=KEY) as server:
        (tmp_path / "key").write_text(KEY)
        path = configure(tmp_path, server, api_key_file=f'"{tmp_path / "key"}"')
        r: Run = await run("run", "--config", path, "--grace", "60", SPEAKER)
        await r.ready()
        job = await r.dispatch(mode="say")
        note = await r.job_says(job.job_id, "started")
        environments = {p.pid: p.environ() for p in psutil.Process(r.pid).children(recursive=True)}
        assert note["pid"] in environments and companion(r).pid in environments and note["key"] is None
        for pid, environment in environments.items():
            assert KEY not in environment.values(), psutil.Process(pid).cmdline()
            assert "INWORLD_API_KEY" not in environment
            assert not any(KEY in argument for argument in psutil.Process(pid).cmdline())
        assert "LIVEKIT_API_SECRET" not in environments[companion(r).pid]
        await r.job_says(job.job_id, "ended", 30)
        # A key of the agent's own is the file's or another account's: the job can tell, and does not have it.
        given = await r.dispatch(mode="say", arguments={"api_key": KEY})
        await r.job_says(given.job_id, "ended", 30)
        shown = json.dumps(await status(r))
        r.kill()
        assert await r.exit() == 0
        await r.clean(job, given)
        assert resource(r)["fate"] == "closed" and server.counts["context_created"] == 2
        assert KEY not in shown + r.out.read_text() + r.err.read_text() + r.receipt_file.read_text()


@pytest.mark.core
async def test_jobs_have_the_users_key(run: StartRun, tmp_path: Path) -> None:
    """INWORLD_API_KEY is as the user has set it; a TTS with another URL never has the local token.

    It goes to that URL, is counted each time, and logged once.
    """
    async with InworldServer(api_key=KEY) as server, InworldServer(api_key=KEY) as other:
        r = await start(run, tmp_path, server, "--grace", "60", "--http", "127.0.0.1:0")
        await r.ready()
        token = psutil.Process(r.workers()[0].pid).environ()["LASTCALL_INWORLD_TOKEN"]
        pooled = await r.dispatch(mode="say", arguments={"api_key": KEY})
        direct = [await r.dispatch(f"{n}", mode="say", arguments={"ws_url": other.ws_url}) for n in range(2)]
        for job in (pooled, *direct):
            assert (await r.job_says(job.job_id, "started"))["key"] == KEY
            await r.job_says(job.job_id, "ended", 30)
        assert (server.counts["context_created"], other.counts["context_created"]) == (1, 2)
        await r.until(lambda: r.log("a TTS goes to Inworld beside the pool"))
        where = r.log("supervisor started")[0]["http"]
        await r.until(lambda: "lastcall_pool_direct_total 2.0" in metrics(where))
        r.kill()
        assert await r.exit() == 0
        await r.clean(pooled, *direct)
        (line,) = r.log("a TTS goes to Inworld beside the pool")
        assert line["reason"] == "the agent gives it a ws_url or a base_url"
        assert other.counts["refused"] == 0
        text = r.out.read_text() + r.err.read_text()
        assert KEY not in text and token not in text


async def test_no_key(run: StartRun, tmp_path: Path) -> None:
    """Exit 78 and one line that says where one may be."""
    async with InworldServer(api_key=KEY) as server:
        path = configure(tmp_path, server)
        r: Run = await run("run", "--config", path, SPEAKER, environment={"INWORLD_API_KEY": ""})
        assert await r.exit() == 78
        assert "no API key: set INWORLD_API_KEY, or inworld.api_key_file" in r.err.read_text()


async def test_reload_hands_over_a_new_key(run: StartRun, tmp_path: Path) -> None:
    """From api_key_file; new connections use it, and the old key is accepted while a job of its time runs."""
    async with InworldServer(api_key="old") as server:
        key_file = tmp_path / "key"
        key_file.write_text("old\n")
        path = configure(tmp_path, server, api_key_file=f'"{key_file}"')
        r: Run = await run("run", "--config", path, SPEAKER, environment={"INWORLD_API_KEY": ""})
        await r.ready()
        before = await r.dispatch(mode="leave", until=str(tmp_path / "go"))
        broker = companion(r).pid
        server.api_key = "new"
        key_file.write_text("new\n")
        await verb(r, "reload", "--wait", timeout=60)
        await r.until(lambda: len(r.livekit.available()) == 1)
        job = await r.dispatch(mode="say")
        url = (await r.job_says(job.job_id, "started"))["ws_url"]
        await r.job_says(job.job_id, "ended", 30)
        assert companion(r).pid == broker
        for key in ("old", "new"):
            async with Job(url, key) as client:
                await client.burst("c", "Hello.")
                await client.said("c", "contextClosed")
        assert await refused(url, "older")
        (tmp_path / "go").touch()
        await eventually_refused(url, "old")
        assert not await refused(url, "new")
        r.kill()
        assert await r.exit() == 0
        await r.clean(before, job)


async def test_a_refused_reload_changes_no_key(run: StartRun, program: Program) -> None:
    """The candidate's key is accepted while it is one, and never used for a connection."""
    async with InworldServer(api_key="old") as server:
        key_file = program.directory / "key"
        key_file.write_text("old\n")
        # For an opaque program: a candidate for as long as the test wants.
        settle = "[reload]\nsettle = 600\n"
        configure(program.directory, server, api_key_file=f'"{key_file}"')
        program.config.write_text(program.config.read_text() + settle)
        r: Run = await run("run", *program.arguments, livekit=False)
        await r.until(lambda: ups(r, "1") == 1 and r.log("companion ready"))
        (slot,) = (await status(r))["slots"]
        url = psutil.Process(slot["pid"]).environ()[variables.INWORLD_WS_URL]
        key_file.write_text("new\n")
        program.write("2")
        await verb(r, "reload")
        await r.until(lambda: ups(r, "2") == 1)
        for key in ("old", "new"):
            assert not await refused(url, key)
        (candidate,) = [s["pid"] for s in (await status(r))["slots"] if s["generation"] == 2]
        os.kill(candidate, signal.SIGKILL)
        await r.until(lambda: r.log("reload failed"))
        await eventually_refused(url, "new")
        async with Job(url, "old") as client:
            await client.burst("c", "Hello.")
            await client.said("c", "contextClosed")
        # The refused program is not tried again when the old one has to be started anew.
        os.kill(slot["pid"], signal.SIGKILL)
        await r.until(lambda: len(r.log("slot ready")) == 3)
        assert await refused(url, "new")
        r.kill()
        assert await r.exit() == 0


async def test_a_reload_with_another_proxy(run: StartRun, program: Program) -> None:
    """Jobs get it, and the pool at the next restart: the log and the verb say so, without the password."""
    async with InworldServer(api_key=KEY) as server:
        env_file = program.directory / "env"
        env_file.write_text("A=1\n")
        configure(program.directory, server, max_contexts=4)
        inworld = program.config.read_text()
        program.config.write_text(f'env_file = "{env_file}"\n{inworld}')
        r: Run = await run("run", *program.arguments, livekit=False, environment={"INWORLD_API_KEY": KEY})
        await r.until(lambda: ups(r, "1") == 1)
        env_file.write_text("HTTPS_PROXY=nonsense\n")
        assert "HTTPS_PROXY: expected" in await verb(r, "reload", "--wait", code=1)
        env_file.write_text("A=2\nHTTPS_PROXY=http://me:s3cret@127.0.0.1:9\n")
        program.config.write_text(f'env_file = "{env_file}"\nlog_format = "console"\n{inworld}')
        said = await verb(r, "reload", "--wait")
        assert "takes effect at the next restart: log_format, HTTPS_PROXY" in said
        assert "1 of 1 done" in said
        told = r.log("takes effect at the next restart")
        assert [(line["key"], line.get("of")) for line in told] == [
            ("log_format", None),
            ("HTTPS_PROXY", "inworld-pool"),
        ]
        (slot,) = (await status_when(r, lambda document: len(document["slots"]) == 1))["slots"]
        assert "s3cret" in psutil.Process(slot["pid"]).environ()["HTTPS_PROXY"]
        assert "HTTPS_PROXY" not in companion(r).environ()
        r.kill()
        assert await r.exit() == 0
        assert "s3cret" not in r.err.read_text()


async def eventually_refused(url: str, key: str) -> None:
    """Wait until the broker refuses a key."""
    async with asyncio.timeout(30):
        while not await refused(url, key):
            await asyncio.sleep(0.1)


async def refused(url: str, key: str) -> bool:
    """Tell whether the broker refuses a key."""
    try:
        async with Job(url, key):
            return False
    except aiohttp.WSServerHandshakeError as error:
        return error.status == 401


async def test_stop_while_the_broker_starts(run: StartRun, program: Program) -> None:
    """At any moment of its start a stop is a clean one."""
    for delay in (0.0, 0.1, 0.3, 0.6):
        async with InworldServer(api_key=KEY) as server:
            configure(program.directory, server)
            environment = {"INWORLD_API_KEY": KEY, "LASTCALL_STOP__COMPANION": "3"}
            r: Run = await run(
                "run", "--grace", "30", *program.arguments, livekit=False, environment=environment
            )
            await r.until(lambda r=r: r.log("companion starting"))  # type: ignore[misc]  # bound early
            await asyncio.sleep(delay)
            os.kill(r.pid, signal.SIGTERM)
            assert await r.exit() == 0
            assert resource(r)["fate"] == "closed"
            await r.nothing_left()
