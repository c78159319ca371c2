"""The local LiveKit server keeps the rules of the real one, seen by a worker of a few lines."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import aiohttp
from livekit.protocol import agent

from lastcall.worker.local.livekit_server import DispatchServer
from tests.support.fake_worker import token, workers


async def test_who_may_connect() -> None:
    """No upgrade 404, no agent grant 401, an undecodable message closes the connection."""
    async with DispatchServer() as server, aiohttp.ClientSession() as session:
        url = server.url.replace("ws", "http") + "/agent"
        async with session.get(url) as answer:
            assert answer.status == 404
        upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
        for headers in ({}, token(server, agent_grant=False)):
            async with session.get(url, headers={**upgrade, **headers}) as answer:
                assert answer.status == 401
        ws = await session.ws_connect(f"{server.url}/agent", headers=token(server))
        await ws.send_bytes(b"\xff\xff\xff")
        assert (await ws.receive(5)).type is aiohttp.WSMsgType.CLOSE
        ws = await session.ws_connect(f"{server.url}/agent", headers=token(server))
        await ws.send_bytes(agent.WorkerMessage(update_worker=agent.UpdateWorkerStatus()).SerializeToString())
        assert (await ws.receive(5)).type is aiohttp.WSMsgType.CLOSE


async def test_a_refusal_tries_the_next_worker() -> None:
    """Each worker once; when all have refused there is none."""
    async with DispatchServer() as server, workers(server, 3) as three:
        for worker in three[:2]:
            worker.answer = False
        assert {(await server.dispatch("r")).worker_id for _ in range(8)} == {three[2].id}
        three[2].answer = False
        assert (await server.dispatch("r")).outcome == "no_worker"
        assert all(worker.offers for worker in three)


async def test_no_answer_fails_the_dispatch() -> None:
    """Nobody else is asked, and a late yes is ignored."""
    async with DispatchServer(answer_timeout=0.2) as server, workers(server, 2) as two:
        for worker in two:
            worker.answer = None
        result = await server.dispatch("r")
        assert result.outcome == "timeout"
        assert sum(len(worker.offers) for worker in two) == 1
        late = next(worker for worker in two if worker.offers)
        response = agent.AvailabilityResponse(job_id=late.offers[0], available=True)
        await late.send(availability=response)
        await server.until(lambda: server.counts["accepted"] == 1, 5)
        assert late.assigned == [] and server.jobs == {}


async def test_the_choice_is_weighted_by_load() -> None:
    """A full worker gets nothing, a loaded one less."""
    async with DispatchServer(seed=1) as server, workers(server, 3) as (idle, loaded, full):
        available, full_status = agent.WorkerStatus.WS_AVAILABLE, agent.WorkerStatus.WS_FULL
        await loaded.send(update_worker=agent.UpdateWorkerStatus(status=available, load=0.9))
        await full.send(update_worker=agent.UpdateWorkerStatus(status=full_status, load=0.0))
        await server.until(lambda: len(server.available()) == 2 and server.counts["available"] == 1, 5)
        got = Counter([(await server.dispatch("r")).worker_id for _ in range(200)])
        assert full.id not in got
        assert got[idle.id] > 4 * got[loaded.id] > 0


async def test_a_lost_connection_forgets_its_jobs() -> None:
    """A new connection is a new, available worker; an end reported there is of an unknown job."""
    async with DispatchServer() as server:
        async with workers(server, 1) as (first,):
            job = await server.dispatch("r")
            assert server.jobs[job.job_id].status == "JS_RUNNING"
            await first.ws.close()
            await server.until(lambda: server.jobs[job.job_id].forgotten, 5)
        async with workers(server, 1) as (second,):
            assert second.id != first.id
            done = agent.UpdateJobStatus(job_id=job.job_id, status=agent.JobStatus.JS_SUCCESS)
            await second.send(update_job=done)
            await server.until(lambda: server.counts["job"] == 1, 5)
            assert server.jobs[job.job_id].status == "JS_RUNNING"


async def test_names_and_connections_in_between() -> None:
    """Only workers of the agent's name are offered its jobs; a cut one counts as a refusal."""
    async with DispatchServer() as server, workers(server, 1, name="a") as (named,):
        assert (await server.dispatch("r")).outcome == "no_worker"
        assert (await server.dispatch("r", agent_name="a")).outcome == "assigned"
        named.answer = None
        began = time.monotonic()
        dispatching = asyncio.create_task(server.dispatch("r", agent_name="a"))
        await server.until(lambda: server.counts["offer"] == 2, 5)
        server.abort_connections()
        assert (await dispatching).outcome == "no_worker"
        assert time.monotonic() - began < 2.5
