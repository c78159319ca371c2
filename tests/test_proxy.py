"""Behind an HTTP proxy: real names, TLS, and the unmodified plugin."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest
from livekit.agents import AgentServer, JobExecutorType

from lastcall.supervisor.doctor.probe import ask
from lastcall.worker.base.proxies import is_loopback, proxy_of, proxy_to
from lastcall.worker.inworld.broker.broker import Broker, listen
from lastcall.worker.inworld.pool.pool import InworldPool
from lastcall.worker.local.inworld_server import InworldServer
from lastcall.worker.local.livekit_server import DispatchServer
from lastcall.worker.sdk import agent_server
from tests.support.harness import HERE, Run, StartRun
from tests.support.inworld_job import Job
from tests.support.proxy import DEAD, certificate, proxy, tls

SPEAKER = str(HERE / "agents" / "speaker.py")
KEY = "the-real-key-of-the-account"


@pytest.mark.core
async def test_calls_speak_behind_a_proxy(run: StartRun, tmp_path: Path) -> None:
    """The broker dials Inworld through the proxy, as a direct TTS does; no job reaches the broker so.

    The doctor asks LiveKit through it too: no name of this test can be resolved.
    """
    pem = certificate(tmp_path, "api.inworld.ai", "other.inworld.test", "livekit.test")
    (tmp_path / "lastcall.toml").write_text("[inworld]\nenabled = true\n")
    async with (
        InworldServer(api_key=KEY) as inworld,
        DispatchServer() as livekit,
        tls(inworld.port, pem) as inworld_port,
        tls(urlsplit(livekit.url).port or 0, pem) as livekit_port,
        proxy(
            {
                "api.inworld.ai:443": inworld_port,
                "other.inworld.test:443": inworld_port,
                "livekit.test:443": livekit_port,
            }
        ) as between,
    ):
        environment = {
            **livekit.environment,
            **between.environment,
            "LIVEKIT_URL": "wss://livekit.test",
            "SSL_CERT_FILE": str(pem),
            "INWORLD_API_KEY": KEY,
        }
        config = str(tmp_path / "lastcall.toml")
        r: Run = await run("run", "--config", config, SPEAKER, livekit=False, environment=environment)
        r.server = livekit
        await r.ready()
        token = psutil.Process(r.workers()[0].pid).environ()["LASTCALL_INWORLD_TOKEN"]
        pooled = await r.dispatch("pooled", mode="say")
        other = {"ws_url": "wss://other.inworld.test/"}
        direct = await r.dispatch("direct", mode="say", arguments=other)
        for job in (pooled, direct):
            assert (await r.job_says(job.job_id, "silent", 30))["frames"] > 0
        assert set(between.seen) == {"api.inworld.ai:443", "other.inworld.test:443", "livekit.test:443"}
        assert not any(token in head or KEY in head for head in between.heads)
        r.server = None
        r.kill()
        assert await r.exit() == 0

        asked = between.seen.count("livekit.test:443")
        # In this process: the certificate of the test is in no store, so that TLS fails behind the proxy.
        answer = await asyncio.to_thread(ask, environment)
        assert answer is not None and "certificate" in answer.error.lower(), answer
        assert between.seen.count("livekit.test:443") > asked


async def test_the_broker_dials_through_the_proxy() -> None:
    """Its WebSocket and its plain calls alike, to a name that only the proxy knows."""
    async with InworldServer(api_key=KEY) as server, proxy({}) as between:
        where = f"inworld.test:{server.port}"
        between.names = {where: server.port}
        async with InworldPool(f"ws://{where}/", KEY, proxy=between.url) as pool:
            with listen() as listener:
                broker = Broker(
                    pool, listener, token="t", key=KEY, base_url=f"http://{where}/", proxy=between.url
                )
                async with broker, Job(broker.ws_url, "t") as job:
                    await job.burst("c", "Hello.")
                    await job.said("c", "contextClosed")
                    headers = {"Authorization": "Basic t"}
                    async with (
                        aiohttp.ClientSession(broker.base_url, headers=headers) as session,
                        session.get("/tts/v1/voices") as answer,
                    ):
                        assert answer.status == 200
        assert between.seen == [where, where]


@pytest.mark.core
async def test_a_worker_of_the_local_server_goes_past_the_proxy() -> None:
    """A proxy that nothing serves is not in its way, and is still told to the jobs."""
    async with DispatchServer() as livekit:
        server = AgentServer(
            ws_url=livekit.url,
            api_key=livekit.environment["LIVEKIT_API_KEY"],
            api_secret=livekit.environment["LIVEKIT_API_SECRET"],
            http_proxy=DEAD["HTTPS_PROXY"],
            job_executor_type=JobExecutorType.THREAD,
            num_idle_processes=0,
            port=0,
        )

        async def entrypoint(_ctx: Any) -> None: ...

        server.rtc_session(entrypoint)
        server.on("worker_started", lambda: agent_server.connect_directly(server))
        running = asyncio.ensure_future(server.run())
        await livekit.until(lambda: bool(livekit.available()), 30)
        assert server._proc_pool._http_proxy == DEAD["HTTPS_PROXY"]
        await server.aclose()
        await asyncio.wait({running}, timeout=10)


async def test_the_doctor_asks_through_the_proxy() -> None:
    """The answer is the server's; a proxy that refuses, or that is not there, is told as such."""
    async with DispatchServer() as livekit, proxy({}) as between:
        port = urlsplit(livekit.url).port
        between.names = {f"livekit.test:{port}": port or 0}

        async def asked(host: str, more: Mapping[str, str]) -> str:
            environment = {**livekit.environment, "LIVEKIT_URL": f"ws://{host}:{port}", **more}
            answer = await asyncio.to_thread(ask, environment)
            assert answer is not None
            return answer.error or str(answer.status)

        assert await asked("livekit.test", between.environment) == "101"
        assert "502" in await asked("unknown.test", between.environment)
        said = await asked("livekit.test", {"HTTPS_PROXY": "http://user:secret@127.0.0.1:9"})
        assert said == "the proxy of HTTPS_PROXY or HTTP_PROXY can't be reached: Connection refused"
        between.names = {}
        environment = {**livekit.environment, **between.environment, "LIVEKIT_URL": "wss://unknown.test"}
        answer = await asyncio.to_thread(ask, environment)
        assert answer is not None
        assert answer.error == "the proxy of HTTPS_PROXY or HTTP_PROXY answers 502 unknown name"


def test_which_proxy() -> None:
    """As livekit-agents finds it: HTTPS_PROXY first, in capitals, without NO_PROXY. Loopback has no proxy."""
    both = {"HTTP_PROXY": "http://a:1", "HTTPS_PROXY": "http://b:2", "NO_PROXY": "*"}
    assert proxy_of(both) == "http://b:2"
    assert proxy_of({"HTTPS_PROXY": "", "HTTP_PROXY": "http://a:1"}) == "http://a:1"
    assert proxy_of({"https_proxy": "http://c:3"}) is None
    assert proxy_to("wss://api.inworld.ai/", both) == "http://b:2"
    for url in ("ws://127.0.0.1:8/", "ws://127.9.9.9/", "ws://LOCALHOST:1/", "ws://[::1]:9/"):
        assert proxy_to(url, both) is None
    assert not is_loopback("10.0.0.1") and not is_loopback("")
