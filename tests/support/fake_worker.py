"""A worker of a few lines, which speaks the agent protocol by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from livekit import api
from livekit.protocol import agent

from lastcall.worker.local.livekit_server import DispatchServer


class FakeWorker:
    """Speaks the protocol by hand; `answer` decides on offers."""

    def __init__(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.ws = ws
        self.id = ""
        self.offers: list[str] = []
        self.assigned: list[str] = []
        self.tokens: list[str] = []
        self.terminated: list[str] = []
        self.answer: bool | None = True
        self.terminates = False
        self.identity = "me"

    async def send(self, **message: Any) -> None:
        await self.ws.send_bytes(agent.WorkerMessage(**message).SerializeToString())

    async def run(self) -> None:
        async for frame in self.ws:
            message = agent.ServerMessage()
            message.ParseFromString(frame.data)
            which = message.WhichOneof("message")
            if which == "register":
                self.id = message.register.worker_id
            elif which == "availability":
                job_id = message.availability.job.id
                self.offers.append(job_id)
                if self.answer is not None:
                    response = agent.AvailabilityResponse(
                        job_id=job_id,
                        available=self.answer,
                        terminate=self.terminates,
                        participant_identity=self.identity,
                    )
                    await self.send(availability=response)
            elif which == "assignment":
                self.assigned.append(message.assignment.job.id)
                self.tokens.append(message.assignment.token)
            elif which == "termination":
                self.terminated.append(message.termination.job_id)


def token(server: DispatchServer, *, agent_grant: bool = True) -> dict[str, str]:
    grants = api.VideoGrants(agent=agent_grant)
    jwt = api.AccessToken(server.api_key, server.api_secret).with_grants(grants).to_jwt()
    return {"Authorization": f"Bearer {jwt}"}


@asynccontextmanager
async def workers(
    server: DispatchServer, count: int, name: str = "", type: agent.JobType = agent.JobType.JT_ROOM
) -> AsyncIterator[list[FakeWorker]]:
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        made = []
        for _ in range(count):
            ws = await session.ws_connect(f"{server.url}/agent", headers=token(server))
            worker = FakeWorker(ws)
            made.append(worker)
            group.create_task(worker.run())
            await worker.send(register=agent.RegisterWorkerRequest(agent_name=name, type=type))
        await server.until(lambda: len(server.available()) >= count, 5)
        yield made
        for worker in made:
            await worker.ws.close()
