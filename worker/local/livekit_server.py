"""A LiveKit server's agent side, on one machine: it registers workers and dispatches jobs to them.

It speaks the agent protocol as livekit-server does (`pkg/agent`, `pkg/service/agentservice.go`):

    worker -> server   register, update_worker, availability, update_job, ping, simulate_job, migrate_job
    server -> worker   register, availability, assignment, termination, pong

Binary frames are protobuf; a text frame switches a connection to JSON, a binary frame switches it back.
Every connection is a new worker: available, load 0, no jobs. Offers go to available workers of the right
agent name and job type, at random, weighted by max(0, 1 - load). A refusal or a closed connection tries
the next; an offer without an answer fails the whole dispatch, because the caller of the real server has
given up by then (3 s). Jobs of a closed connection are forgotten.

Guessed, because no published text says it: the close codes, and the text of the server's own errors.
There is no media server here, so a job can't join a room.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from aiohttp import web
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from livekit import api
from livekit.protocol import agent, models

from lastcall.worker.base.condition import Condition

REGISTER_TIMEOUT = 10.0
ANSWER_TIMEOUT = 3.0
PING_INTERVAL = 10.0
MAX_EVENTS = 200_000

Outcome = Literal["assigned", "no_worker", "timeout", "terminated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One line of the server's log. `at` is CLOCK_MONOTONIC, comparable between processes of a machine."""

    at: float
    kind: str
    worker_id: str = ""
    job_id: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class JobRecord:
    """What the server knows of one job: RUNNING from the moment it is assigned."""

    job: agent.Job
    worker_id: str
    status: str = "JS_RUNNING"
    forgotten: bool = False
    ended_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatched:
    """How one dispatch ended."""

    outcome: Outcome
    job_id: str
    worker_id: str = ""
    seconds: float = 0.0


class Peer:
    """One worker connection."""

    def __init__(self, worker_id: str, request: web.Request, ws: web.WebSocketResponse) -> None:
        self.id = worker_id
        self.request = request
        self.ws = ws
        self.registered = False
        self.available = True
        self.load = 0.0
        self.agent_name = ""
        self.namespace = ""
        self.deployment = ""
        self.type = agent.JobType.JT_ROOM
        self.json = False
        self.jobs: set[str] = set()
        self.answers: dict[str, asyncio.Future[agent.AvailabilityResponse | None]] = {}

    async def send(self, message: agent.ServerMessage) -> None:
        if self.json:
            await self.ws.send_str(json_format.MessageToJson(message))
        else:
            await self.ws.send_bytes(message.SerializeToString())

    def accepts(self, job: agent.Job) -> bool:
        key = (self.agent_name, self.namespace, self.type, self.deployment)
        return (
            self.registered
            and self.available
            and not self.ws.closed
            and key == (job.agent_name, job.namespace, job.type, job.deployment)
        )


class DispatchServer:
    """Serve the agent protocol on loopback and dispatch jobs; use as an async context manager.

    `answer_timeout` is in seconds. `on_event` sees every event as it happens. The key and secret are the
    well-known development pair unless given.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str = "devkey",
        api_secret: str = "secret-for-local-use-only-0123456789",
        answer_timeout: float = ANSWER_TIMEOUT,
        on_event: Callable[[Event], None] | None = None,
        seed: int | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self.api_key = api_key
        self.api_secret = api_secret
        self.answer_timeout = answer_timeout
        self.peers: dict[str, Peer] = {}
        self.jobs: dict[str, JobRecord] = {}
        self.events: list[Event] = []
        self.counts: Counter[str] = Counter()
        self.refuse_connections = False
        self.hold_assignments = 0.0
        self._on_event = on_event
        self._random = random.Random(seed)
        self._changed = Condition()
        self._runner: web.AppRunner | None = None
        self.app = web.Application()
        self.app.router.add_get("/agent", self._agent)

    @property
    def url(self) -> str:
        return f"ws://{self.host}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a worker at this server."""
        return {
            "LIVEKIT_URL": self.url,
            "LIVEKIT_API_KEY": self.api_key,
            "LIVEKIT_API_SECRET": self.api_secret,
        }

    async def __aenter__(self) -> DispatchServer:
        self._runner = web.AppRunner(self.app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self.host, self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut_connections()
        assert self._runner is not None
        await self._runner.cleanup()

    # -- what callers do ------------------------------------------------------------------------------

    async def dispatch(
        self,
        room: str,
        *,
        agent_name: str = "",
        metadata: str = "",
        namespace: str = "",
        deployment: str = "",
        only: str = "",
    ) -> Dispatched:
        """Offer one job to the workers until one takes it; `only` restricts the offer to one worker id."""
        began = time.monotonic()
        job = agent.Job(
            id=f"AJ_{secrets.token_hex(6)}",
            dispatch_id=f"AD_{secrets.token_hex(6)}",
            type=agent.JobType.JT_ROOM,
            room=models.Room(sid=f"RM_{secrets.token_hex(6)}", name=room),
            agent_name=agent_name,
            metadata=metadata,
            namespace=namespace,
            deployment=deployment,
        )
        job.state.status = agent.JobStatus.JS_RUNNING
        tried: set[str] = set()

        def ended(outcome: Outcome, worker_id: str = "") -> Dispatched:
            self._emit(f"dispatch_{outcome}", worker_id, job.id, room=room)
            seconds = time.monotonic() - began
            return Dispatched(outcome=outcome, job_id=job.id, worker_id=worker_id, seconds=seconds)

        while True:
            peer = self._choose(job, tried, only)
            if peer is None:
                return ended("no_worker")
            tried.add(peer.id)
            try:
                answer = await self._offer(peer, job)
            except TimeoutError:
                return ended("timeout", peer.id)
            if answer is None or not answer.available:
                if answer is not None and answer.terminate:
                    return ended("terminated", peer.id)
                continue
            if await self._assign(peer, job, answer):
                return ended("assigned", peer.id)

    async def terminate(self, job_id: str) -> None:
        """End a job as a deleted room would: the worker is told and the job is forgotten at once."""
        record = self.jobs[job_id]
        record.forgotten = True
        peer = self.peers.get(record.worker_id)
        if peer is not None:
            peer.jobs.discard(job_id)
            await peer.send(agent.ServerMessage(termination=agent.JobTermination(job_id=job_id)))

    async def cut_connections(self) -> None:
        """Close every worker's connection, as a server that drains or restarts does."""
        await asyncio.gather(*(peer.ws.close(code=1001) for peer in list(self.peers.values())))

    def abort_connections(self) -> None:
        """Drop every worker's connection without a close frame, as a broken network does."""
        for peer in list(self.peers.values()):
            if peer.request.transport is not None:
                peer.request.transport.abort()

    def available(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.registered and peer.available]

    async def until(self, predicate: Callable[[], bool], timeout: float) -> None:
        """Wait until the predicate holds; it is looked at after every event. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            await self._changed.until(predicate)

    # -- one dispatch ---------------------------------------------------------------------------------

    def _choose(self, job: agent.Job, tried: set[str], only: str) -> Peer | None:
        candidates = [
            peer
            for peer in self.peers.values()
            if peer.id not in tried and peer.accepts(job) and only in ("", peer.id)
        ]
        weights = [max(0.0, 1.0 - peer.load) for peer in candidates]
        if not candidates or sum(weights) <= 0:
            return None
        return self._random.choices(candidates, weights)[0]

    async def _offer(self, peer: Peer, job: agent.Job) -> agent.AvailabilityResponse | None:
        answer: asyncio.Future[agent.AvailabilityResponse | None]
        answer = asyncio.get_running_loop().create_future()
        peer.answers[job.id] = answer
        self._emit("offer", peer.id, job.id, room=job.room.name)
        try:
            with contextlib.suppress(ConnectionError):
                request = agent.AvailabilityRequest(job=job)
                await peer.send(agent.ServerMessage(availability=request))
            async with asyncio.timeout(self.answer_timeout):
                return await answer
        finally:
            peer.answers.pop(job.id, None)

    async def _assign(self, peer: Peer, job: agent.Job, answer: agent.AvailabilityResponse) -> bool:
        if self.hold_assignments:
            await asyncio.sleep(self.hold_assignments)
        if peer.ws.closed or peer.id not in self.peers:
            return False
        grants = api.VideoGrants(room_join=True, room=job.room.name, agent=True)
        token = (
            api.AccessToken(self.api_key, self.api_secret)
            .with_identity(answer.participant_identity)
            .with_kind("agent")
            .with_grants(grants)
            .to_jwt()
        )
        assignment = agent.JobAssignment(job=job, token=token)
        self.jobs[job.id] = JobRecord(job=job, worker_id=peer.id)
        peer.jobs.add(job.id)
        self._emit("assigned", peer.id, job.id, room=job.room.name)
        try:
            await peer.send(agent.ServerMessage(assignment=assignment))
        except ConnectionError:
            self._forget(peer, job.id)
            return False
        return True

    # -- one connection -------------------------------------------------------------------------------

    def _may_connect(self, request: web.Request) -> bool:
        header = request.headers.get("Authorization", "").removeprefix("Bearer ")
        try:
            claims = api.TokenVerifier(self.api_key, self.api_secret).verify(header)
        except Exception:  # whatever the verifier dislikes is the same 401 to the client
            return False
        return bool(claims.video and claims.video.agent)

    async def _agent(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return web.Response(status=404)
        if self.refuse_connections:
            return web.Response(status=503)
        if not self._may_connect(request):
            return web.Response(status=401)
        ws = web.WebSocketResponse(heartbeat=PING_INTERVAL, timeout=1.0)
        await ws.prepare(request)
        peer = Peer(f"AW_{secrets.token_hex(6)}", request, ws)
        self.peers[peer.id] = peer
        self._emit("connected", peer.id)
        try:
            await self._serve(peer)
        finally:
            self._disconnected(peer)
        return ws

    async def _serve(self, peer: Peer) -> None:
        register_at = asyncio.get_running_loop().time() + REGISTER_TIMEOUT
        while True:
            try:
                async with asyncio.timeout_at(None if peer.registered else register_at):
                    frame = await peer.ws.receive()
            except TimeoutError:
                await peer.ws.close(code=1002, message=b"not registered in time")
                return
            message = agent.WorkerMessage()
            try:
                if frame.type is aiohttp.WSMsgType.BINARY:
                    peer.json = False
                    message.ParseFromString(frame.data)
                elif frame.type is aiohttp.WSMsgType.TEXT:
                    peer.json = True
                    json_format.Parse(frame.data, message, ignore_unknown_fields=True)
                else:
                    return
            except (DecodeError, json_format.ParseError):
                await peer.ws.close(code=1003, message=b"undecodable message")
                return
            which = message.WhichOneof("message")
            if which is None or (not peer.registered and which not in ("register", "ping")):
                await peer.ws.close(code=1002, message=b"unexpected message")
                return
            await self._handle(peer, which, message)

    async def _handle(self, peer: Peer, which: str, message: agent.WorkerMessage) -> None:
        if which == "register":
            await self._register(peer, message.register)
        elif which == "ping":
            pong = agent.WorkerPong(last_timestamp=message.ping.timestamp, timestamp=int(time.time() * 1000))
            await peer.send(agent.ServerMessage(pong=pong))
        elif which == "update_worker":
            update = message.update_worker
            if update.HasField("status"):
                peer.available = update.status == agent.WorkerStatus.WS_AVAILABLE
            peer.load = update.load
            kind = "available" if peer.available else "full"
            self._emit(kind, peer.id, load=round(update.load, 3), jobs=update.job_count)
        elif which == "availability":
            self._answered(peer, message.availability)
        elif which == "update_job":
            self._job_updated(peer, message.update_job)

    async def _register(self, peer: Peer, register: agent.RegisterWorkerRequest) -> None:
        peer.agent_name = register.agent_name
        peer.namespace = register.namespace
        peer.deployment = register.deployment
        peer.type = register.type
        info = models.ServerInfo(edition=models.ServerInfo.Edition.Standard, version="local", protocol=16)
        response = agent.RegisterWorkerResponse(worker_id=peer.id, server_info=info)
        await peer.send(agent.ServerMessage(register=response))
        peer.registered = True
        self._emit("registered", peer.id, agent_name=peer.agent_name, version=register.version)

    def _answered(self, peer: Peer, answer: agent.AvailabilityResponse) -> None:
        waiter = peer.answers.get(answer.job_id)
        late = waiter is None or waiter.done()
        kind = "accepted" if answer.available else "refused"
        self._emit(kind, peer.id, answer.job_id, late=late)
        if waiter is not None and not waiter.done():
            waiter.set_result(answer)

    def _job_updated(self, peer: Peer, update: agent.UpdateJobStatus) -> None:
        record = self.jobs.get(update.job_id)
        status = agent.JobStatus.Name(update.status)
        known = record is not None and not record.forgotten and record.worker_id == peer.id
        self._emit("job", peer.id, update.job_id, status=status, known=known)
        if record is None or not known:
            return
        record.status = status
        if update.status > agent.JobStatus.JS_RUNNING:
            record.ended_at = time.monotonic()
            peer.jobs.discard(update.job_id)

    def _disconnected(self, peer: Peer) -> None:
        self.peers.pop(peer.id, None)
        for waiter in peer.answers.values():
            if not waiter.done():
                waiter.set_result(None)
        for job_id in list(peer.jobs):
            self._forget(peer, job_id)
        self._emit("disconnected", peer.id, code=peer.ws.close_code)

    def _forget(self, peer: Peer, job_id: str) -> None:
        peer.jobs.discard(job_id)
        self.jobs[job_id].forgotten = True
        self._emit("forgotten", peer.id, job_id)

    def _emit(self, kind: str, worker_id: str = "", job_id: str = "", **detail: Any) -> None:
        event = Event(at=time.monotonic(), kind=kind, worker_id=worker_id, job_id=job_id, detail=detail)
        self.counts[kind] += 1
        self.events.append(event)
        if len(self.events) > MAX_EVENTS:
            del self.events[: MAX_EVENTS // 10]
        if self._on_event is not None:
            self._on_event(event)
        self._changed.notify()
