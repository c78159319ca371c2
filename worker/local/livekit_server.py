"""A LiveKit server on one machine: rooms, and the dispatch of jobs to the workers that register.

It speaks the agent protocol as livekit-server does (`pkg/agent`, `pkg/service/agentservice.go`):

    worker -> server   register, update_worker, availability, update_job, ping, simulate_job, migrate_job
    server -> worker   register, availability, assignment, termination, pong

Binary frames are protobuf; a text frame switches a connection to JSON, a binary frame switches it back.
Every connection is a new worker: available, load 0, no jobs. Offers go to available workers of the right
agent name and job type, at random, weighted by max(0, 1 - load). A refusal or a closed connection tries
the next; a refusal with `terminate` ends the job, and no other worker is asked
(pkg/service/agentservice.go:440, pkg/agent/worker.go:375). An offer without an answer fails the whole
dispatch, because the caller of the real server has given up by then (3 s). Jobs of a closed connection are
forgotten, and the later updates of their ends are of unknown jobs.

The server terminates jobs (pkg/agent/worker.go, TerminateJob):

    the agent's participant leaves its room, however    at once; the job counts as JS_FAILED, "agent worker
                                                        left the room" (pkg/rtc/room.go:1481). That is the
                                                        ordinary end of a job, and a full reconnect too
    DeleteDispatch                                      at once, as JS_SUCCESS; an agent that is still there
                                                        after 3 s is removed (pkg/rtc/room.go:904)
    DeleteRoom, and a room that closes                  as its agents leave

A terminated job is forgotten. Rooms and participants are in `rooms`, their connections in `room_server`, the
HTTP services in `twirp`. There is no media server: a job has the room of `room` in place of livekit's.

Guessed, because no published text says it: the close codes, and the text of the server's own errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from aiohttp import web
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from livekit import api
from livekit.protocol import agent, agent_dispatch, models

from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.local import room_server
from lastcall.worker.local.room_server import RoomServer, Visitor
from lastcall.worker.local.rooms import GHOST, PATH, UNPUBLISHED, Kind, Launch, Reason, Room
from lastcall.worker.local.twirp import Twirp

REGISTER_TIMEOUT = 10.0
ANSWER_TIMEOUT = 3.0
PING_INTERVAL = 10.0
MAX_EVENTS = 200_000
# Seconds from the end of the agent until a caller of `dispatch` hangs up. Ours: a full reconnect takes less.
CALLER_WAITS = 3.0

Outcome = Literal["assigned", "no_worker", "timeout", "terminated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delays:
    """The times that the real server takes, in seconds, which a caller may make shorter.

    `affinity`: from a dispatch to its first offer. The server collects answers from its nodes for so long
    (measured, 200 to 210 ms). `check_enabled`: after a worker has registered, the next job is linked to its
    agent only so much later (CheckEnabledTimeout, pkg/agent/client.go). A job that is not linked is not
    terminated when its agent leaves. `removal`: from DeleteDispatch until an agent that stays is removed.
    `ghost`: how long a participant without a connection stays. `unpublished`: how late at most the others are
    told of a participant that has never published.
    """

    affinity: float = 0.2
    check_enabled: float = 5.0
    removal: float = 3.0
    ghost: float = GHOST
    unpublished: float = UNPUBLISHED


# Seconds for which the server keeps what it knows of the workers: EnabledCacheTTL, pkg/agent/client.go.
ENABLED_FOR = 60.0


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
    """The server's record of one job. The job is RUNNING from the moment it is assigned."""

    job: agent.Job
    worker_id: str
    status: str = "JS_RUNNING"
    forgotten: bool = False
    ended_at: float | None = None
    error: str = ""


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
        delays: Delays | None = None,
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
        # Whether a key may administer rooms. Some are made without that right.
        self.may_dispatch = True
        self._on_event = on_event
        self._random = random.Random(seed)
        self._changed = Condition()
        self._runner: web.AppRunner | None = None
        self.delays = delays or Delays()
        self._enabled_at: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.rooms = RoomServer(
            verify=self._verify,
            launch=self._launch,
            agent_left=self._agent_left,
            emit=self._emit,
            ghost=self.delays.ghost,
            unpublished=self.delays.unpublished,
        )
        self.app = web.Application(client_max_size=room_server.MAX_MESSAGE)
        self.app.router.add_get("/agent", self._agent)
        self.app.router.add_get(PATH, self.rooms.connect)
        self.app.router.add_post("/twirp/{service}/{method}", Twirp(self._verify, self).handle)

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
        self.rooms.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await self.rooms.aclose()
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
        caller: str = "",
    ) -> Dispatched:
        """Offer one job to the workers until one takes it; `only` restricts the offer to one worker id.

        This is the dispatch of a room from its first offer on, so `Delays.affinity` and
        `Delays.check_enabled` are left out. `caller`: the identity of a participant that is in the room by
        then, and that hangs up once the agent has left.
        """
        state, _ = self.rooms.state.open(room, now(), automatic=False)
        dispatch = agent_dispatch.AgentDispatch(
            id=f"AD_{secrets.token_hex(6)}",
            room=room,
            agent_name=agent_name,
            metadata=metadata,
            deployment=deployment,
        )
        if caller and caller not in state.participants:
            self._spawn(self._hang_up_after_the_agent(self.rooms.visit(room, caller), room))
        state.dispatches[dispatch.id] = dispatch
        job = self._job_of(state, dispatch, agent.JobType.JT_ROOM)
        job.namespace = namespace
        done = await self._find_worker(job, only)
        if done.outcome in ("assigned", "terminated"):
            self.rooms.state.link(room, state.info.sid, job)
        return done

    def create_dispatch(
        self, room: str, dispatch: agent_dispatch.AgentDispatch
    ) -> agent_dispatch.AgentDispatch:
        """Do what CreateDispatch does: answer at once, offer later, and never again.

        A room that does not exist is made, and so gets the automatic dispatch too.
        """
        state = self.open_room(room)
        effects = self.rooms.state.dispatch(state, dispatch)
        self._emit("dispatch_created", room=room, dispatch=dispatch.id)
        self.rooms.perform(effects)
        return dispatch

    def delete_dispatch(self, room: str, dispatch_id: str) -> agent_dispatch.AgentDispatch | None:
        """Terminate the jobs of a dispatch, and remove agents that stay, as DeleteDispatch does."""
        state = self.rooms.state.get(room)
        dispatch = None if state is None else state.dispatches.pop(dispatch_id, None)
        if dispatch is not None:
            self._spawn(self._end_dispatch(room, dispatch))
        return dispatch

    def open_room(self, name: str) -> Room:
        """Return the room of this name, made with the automatic dispatch if there is none."""
        room, effects = self.rooms.state.open(name, now(), automatic=True)
        self.rooms.perform(effects)
        return room

    def delete_room(self, name: str) -> bool:
        """Do what DeleteRoom does. Return False if there is no such room."""
        is_there = self.rooms.state.get(name) is not None
        self.rooms.perform(self.rooms.state.delete(name, Reason.ROOM_DELETED))
        return is_there

    async def terminate(self, job_id: str, *, agent_left: bool = False) -> bool:
        """Tell a worker that a job is over, and forget the job. Return False if the worker does not have it.

        pkg/agent/worker.go, TerminateJob. A worker that has reconnected is a new one and has no jobs.
        """
        record = self.jobs[job_id]
        peer = self.peers.get(record.worker_id)
        if record.forgotten or peer is None or job_id not in peer.jobs:
            return False
        record.forgotten = True
        record.status = "JS_FAILED" if agent_left else "JS_SUCCESS"
        record.error = "agent worker left the room" if agent_left else ""
        record.ended_at = time.monotonic()
        peer.jobs.discard(job_id)
        self._emit("terminated", peer.id, job_id, status=record.status, error=record.error)
        with contextlib.suppress(ConnectionError):
            await peer.send(agent.ServerMessage(termination=agent.JobTermination(job_id=job_id)))
        return True

    async def cut_connections(self) -> None:
        """Close every worker's connection, as a server that drains or restarts does."""
        await asyncio.gather(*(peer.ws.close(code=1001) for peer in list(self.peers.values())))

    def abort_connections(self) -> None:
        """Drop every worker's connection without a close frame, as a broken network does."""
        for peer in list(self.peers.values()):
            if peer.request.transport is not None:
                peer.request.transport.abort()

    def forget_everything(self) -> None:
        """Lose every connection and all rooms, as a server that is killed and starts again at once."""
        self.rooms.forget_everything()
        self.abort_connections()

    def available(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if peer.registered and peer.available]

    async def until(self, predicate: Callable[[], bool], timeout: float) -> None:
        """Wait until the predicate holds; it is looked at after every event. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            await self._changed.until(predicate)

    # -- one dispatch ---------------------------------------------------------------------------------

    def _job_of(
        self,
        room: Room,
        dispatch: agent_dispatch.AgentDispatch,
        type: int,
        participant: models.ParticipantInfo | None = None,
    ) -> agent.Job:
        job = agent.Job(
            id=f"AJ_{secrets.token_hex(6)}",
            dispatch_id=dispatch.id,
            type=agent.JobType.Name(type),
            room=room.info,
            agent_name=dispatch.agent_name,
            metadata=dispatch.metadata,
            deployment=dispatch.deployment,
            attributes=dict(dispatch.attributes),
            participant=participant,
        )
        job.state.status = agent.JobStatus.JS_RUNNING
        return job

    async def _find_worker(self, job: agent.Job, only: str = "") -> Dispatched:
        """Offer a job to one worker after the other, and keep in the job the identity that one answers."""
        began = time.monotonic()
        tried: set[str] = set()

        def ended(outcome: Outcome, worker_id: str = "") -> Dispatched:
            self._emit(f"dispatch_{outcome}", worker_id, job.id, room=job.room.name)
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
            job.state.participant_identity = answer.participant_identity
            if await self._assign(peer, job, answer):
                return ended("assigned", peer.id)

    def _launch(self, launch: Launch) -> None:
        self._spawn(self._offer_later(launch))

    async def _offer_later(self, launch: Launch) -> None:
        """Offer the job of a dispatch as the real server does by itself."""
        began = now()
        if self._enabled_at is None or began - self._enabled_at > ENABLED_FOR:
            self._enabled_at = began
        linked_at = self._enabled_at + self.delays.check_enabled
        await asyncio.sleep(self.delays.affinity)
        room = self.rooms.state.get(launch.room)
        dispatch = None if room is None else room.dispatches.get(launch.dispatch_id)
        if room is None or dispatch is None:
            return
        job = self._job_of(room, dispatch, launch.type, launch.participant)
        done = await self._find_worker(job)
        await asyncio.sleep(max(0.0, linked_at - now()))
        if done.outcome in ("assigned", "terminated"):
            self.rooms.state.link(launch.room, room.info.sid, job)

    async def _end_dispatch(self, room_name: str, dispatch: agent_dispatch.AgentDispatch) -> None:
        """End the jobs of a deleted dispatch; of a job that its worker does not have any more nothing."""
        removals: dict[str, float] = {}
        for job in dispatch.state.jobs:
            room = self.rooms.state.get(room_name)
            identity = job.state.participant_identity
            info = None if room is None else room.participants.get(identity)
            is_linked = room is not None and room.agents.get(identity) == job.id
            if job.id in self.jobs and await self.terminate(job.id) and info is not None:
                removals[info.sid] = self.delays.removal if is_linked else 0.0
        for sid, delay in removals.items():
            await asyncio.sleep(delay)
            self.rooms.remove_session(sid)

    def _agent_left(self, job_id: str) -> None:
        self._spawn(self._terminate_left(job_id))

    async def _terminate_left(self, job_id: str) -> None:
        await self.terminate(job_id, agent_left=True)

    async def _hang_up_after_the_agent(self, caller: Visitor, room: str) -> None:
        """Have a caller leave as people do, once nobody has talked to them for a while."""
        left_at: float | None = None
        was_there = False
        while caller.is_connected:
            state = self.rooms.state.get(room)
            is_there = state is not None and any(p.kind == Kind.AGENT for p in state.participants.values())
            was_there = was_there or is_there
            if is_there or not was_there:
                left_at = None
            elif left_at is None:
                left_at = now()
            elif now() - left_at >= CALLER_WAITS:
                caller.leave()
            await asyncio.sleep(CALLER_WAITS / 10)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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
        # The server adds the name of the agent to the attributes: pkg/agent/worker.go, AssignJob.
        attributes = {**answer.participant_attributes, "lk.agent_name": peer.agent_name}
        token = (
            api.AccessToken(self.api_key, self.api_secret)
            .with_identity(answer.participant_identity)
            .with_name(answer.participant_name)
            .with_metadata(answer.participant_metadata)
            .with_attributes(attributes)
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

    def _verify(self, token: str) -> api.Claims | None:
        try:
            return api.TokenVerifier(self.api_key, self.api_secret).verify(token)
        except Exception:  # whatever the verifier dislikes is the same 401 to the client
            return None

    def _may_connect(self, request: web.Request) -> bool:
        claims = self._verify(request.headers.get("Authorization", "").removeprefix("Bearer "))
        return bool(claims and claims.video and claims.video.agent)

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
        self._enabled_at = None  # a worker that registers makes the server ask again: pkg/agent/client.go
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
