"""The connections of the rooms: `rooms` decides what each session is told, and this module tells it.

A client (`room`, in a job) speaks JSON text frames over a WebSocket at `rooms.PATH`. The first frame that it
gets is `joined`, with everybody who is in the room; then each side sends as it likes:

    client   {"do": "update" | "publish" | "unpublish" | "mute" | "tick" | "relay" | "leave", …}
    server   {"on": "joined" | "participant_connected" | "participant_disconnected" | "participant_updated"
              | "published" | "track_published" | "track_unpublished" | "track_muted" | "relay"
              | "disconnected", …}

A frame of audio is a tick: it has a number and no sound. Data, RPC and streams are relayed, as between real
clients. A `Visitor` is a participant without a connection, in the server's own process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import aiohttp
from aiohttp import web
from livekit import api
from livekit.protocol import models

from lastcall.worker.base.clock import now
from lastcall.worker.local.rooms import (
    GHOST,
    UNPUBLISHED,
    AgentLeft,
    Effect,
    Hangup,
    Kind,
    Launch,
    Reason,
    Rooms,
    Tell,
)

# Seconds between two looks at ghosts and idle rooms. Ours: both have tens of seconds.
LOOK_EVERY = 0.5
# Messages that wait for one connection. Ours: a second of ticks from several participants.
MAX_WAITING = 2000
# Bytes of one message. Ours: a chunk of a stream has 15 kB, metadata and attributes at most 600 kB.
MAX_MESSAGE = 1 << 20
KINDS = {"agent": Kind.AGENT, "sip": Kind.SIP, "egress": Kind.EGRESS, "ingress": Kind.INGRESS}

Message = dict[str, Any]


class Session(Protocol):
    """The other end of a participant's session."""

    def tell(self, message: Message) -> None: ...

    def hang_up(self) -> None: ...

    def drop(self) -> None: ...


class RoomServer:
    """Rooms, and the connections to them.

    `verify` returns the claims of a token, or None. `launch` offers a job, `agent_left` terminates one, and
    `emit` is told what happens.
    """

    def __init__(
        self,
        *,
        verify: Callable[[str], api.Claims | None],
        launch: Callable[[Launch], None],
        agent_left: Callable[[str], None],
        emit: Callable[..., None],
        ghost: float = GHOST,
        unpublished: float = UNPUBLISHED,
    ) -> None:
        self.state = Rooms(ghost=ghost, unpublished=unpublished)
        self._verify = verify
        self._launch = launch
        self._agent_left = agent_left
        self._emit = emit
        self._sessions: dict[str, Session] = {}
        self._watch: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Begin to look for ghosts and idle rooms, until `aclose`."""
        self._watch = asyncio.create_task(self._expire())

    async def aclose(self) -> None:
        """Disconnect everybody, as a server that ends does."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        for sid in list(self._sessions):
            self._perform([Hangup(sid=sid, reason=Reason.SERVER_SHUTDOWN)])

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY)
            self._perform(self.state.expire(now()))

    # -- what the owner of rooms does -----------------------------------------------------------------

    def visit(
        self, room: str, identity: str, *, kind: models.ParticipantInfo.Kind = Kind.STANDARD
    ) -> Visitor:
        """Have a participant join that has no connection, as a caller. The others see it at once."""
        visitor = Visitor(self)
        info = models.ParticipantInfo(identity=identity, kind=kind)
        info.permission.can_publish = True
        self._join(room, info, visitor, is_prompt=True)
        return visitor

    def open(self, room: str) -> None:
        """Make a room that gets no job by itself, as where the server has no worker without a name."""
        self.state.open(room, now(), automatic=False)

    def perform(self, effects: Iterable[Effect]) -> None:
        """Perform what the state has answered to a change."""
        self._perform(effects)

    def remove(self, room: str, identity: str) -> bool:
        """Remove a participant, as RoomService.RemoveParticipant does. Return False if there is none."""
        found = self.state.get(room)
        info = None if found is None else found.participants.get(identity)
        if info is None:
            return False
        self._perform(self.state.leave(info.sid, Reason.PARTICIPANT_REMOVED, now()))
        return True

    def reconnect_agents(self) -> None:
        """Have the agents of all rooms reconnect from the start."""
        for room in self.state:
            for identity in list(room.agents):
                self.reconnect(room.info.name, identity)

    def reconnect(self, room: str, identity: str) -> None:
        """Have a client reconnect from the start, as a server does whose media connection has failed."""
        found = self.state.get(room)
        info = None if found is None else found.participants.get(identity)
        if info is not None:
            self._perform([Tell(sid=info.sid, message={"on": "reconnect"})])

    def lose(self, room: str, identity: str) -> None:
        """Lose the connection of a client without a word, as of one that answers no ping."""
        found = self.state.get(room)
        info = None if found is None else found.participants.get(identity)
        if info is not None:
            self._sessions[info.sid].drop()

    def forget_everything(self) -> None:
        """Drop every connection without a word, and every room."""
        sessions = list(self._sessions.values())
        self._sessions.clear()
        self.state.forget_everything()
        for session in sessions:
            session.drop()

    def remove_session(self, sid: str) -> None:
        """Remove one session of a participant, and none that has taken its place."""
        self._perform(self.state.leave(sid, Reason.PARTICIPANT_REMOVED, now()))

    # -- one session ----------------------------------------------------------------------------------

    async def connect(self, request: web.Request) -> web.StreamResponse:
        """Serve one client of a room."""
        header = request.headers.get("Authorization", "").removeprefix("Bearer ")
        claims = self._verify(header)
        if claims is None or claims.video is None or not claims.video.room_join:
            return web.Response(status=401)
        ws = web.WebSocketResponse(max_msg_size=MAX_MESSAGE, timeout=1.0)
        await ws.prepare(request)
        info = models.ParticipantInfo(
            identity=claims.identity,
            name=claims.name,
            metadata=claims.metadata,
            attributes=dict(claims.attributes or {}),
            kind=KINDS.get(claims.kind, Kind.STANDARD),
        )
        info.permission.can_publish = claims.video.can_publish is not False
        connection = _Connection(ws)
        self._join(claims.video.room, info, connection)
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(connection.write())
            said_goodbye = False
            async for frame in ws:
                if frame.type is not aiohttp.WSMsgType.TEXT:
                    break
                message = json.loads(frame.data)
                if message["do"] == "leave":
                    said_goodbye = True
                    break
                self.say(info.sid, message)
            if self._sessions.pop(info.sid, None) is not None:
                if said_goodbye:
                    self._perform(self.state.leave(info.sid, Reason.CLIENT_INITIATED, now()))
                    self._emit("left", room=claims.video.room, identity=info.identity)
                else:
                    self.state.lose(info.sid, now())
                    self._emit("ghost", room=claims.video.room, identity=info.identity)
            writing.cancel()
        return ws

    def say(self, sid: str, message: Message) -> None:
        """Do what a client asks for."""
        state = self.state
        match message:
            case {"do": "relay", "to": to, "what": what}:
                self._perform(state.relay(sid, to, what))
            case {"do": "tick", "sid": track}:
                self._perform(state.tick(sid, track, message))
            case {"do": "update", **changes}:
                known = {key: changes[key] for key in ("attributes", "metadata", "name") if key in changes}
                self._perform(state.update(sid, **known))
            case {"do": "publish", "name": name}:
                track, effects = state.publish(sid, name)
                self._perform([Tell(sid=sid, message={"on": "published", "sid": track}), *effects])
            case {"do": "unpublish", "sid": track}:
                self._perform(state.unpublish(sid, track))
            case {"do": "mute", "sid": track, "muted": muted}:
                self._perform(state.mute(sid, track, muted))
            case _:
                self._emit("not understood", do=str(message.get("do")))

    def leave(self, sid: str) -> None:
        """End a session as a client does that leaves."""
        self._sessions.pop(sid, None)
        self._perform(self.state.leave(sid, Reason.CLIENT_INITIATED, now()))

    def _join(
        self, room: str, info: models.ParticipantInfo, session: Session, *, is_prompt: bool = False
    ) -> None:
        effects = self.state.join(room, info, now(), is_prompt=is_prompt)
        self._sessions[info.sid] = session
        is_agent = info.kind == Kind.AGENT
        self._emit("joined", room=room, identity=info.identity, participant=info.sid, is_agent=is_agent)
        self._perform(effects)

    def _perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Tell(sid=sid, message=message):
                    session = self._sessions.get(sid)
                    if session is not None:
                        session.tell(message)
                case Hangup(sid=sid, reason=reason):
                    session = self._sessions.pop(sid, None)
                    if session is not None:
                        session.tell({"on": "disconnected", "reason": int(reason)})
                        session.hang_up()
                    self._emit("hangup", participant=sid, reason=Reason.Name(reason))
                case AgentLeft(job_id=job_id):
                    self._agent_left(job_id)
                case Launch():
                    self._launch(effect)


class _Connection:
    """The WebSocket of a client; one task writes, so that no message overtakes another."""

    def __init__(self, ws: web.WebSocketResponse) -> None:
        self._ws = ws
        self._waiting: asyncio.Queue[Message | None] = asyncio.Queue(maxsize=MAX_WAITING)

    def tell(self, message: Message) -> None:
        self._put(message)

    def hang_up(self) -> None:
        self._put(None)

    def _put(self, message: Message | None) -> None:
        # A client that reads nothing for so long misses messages, as it would with data over a network. The
        # newest are kept, because the last one says why the session ends.
        while self._waiting.full():
            self._waiting.get_nowait()
        self._waiting.put_nowait(message)

    def drop(self) -> None:
        """Lose the connection."""
        self.hang_up()

    async def write(self) -> None:
        """Write what is told until the session is over, then close."""
        while (message := await self._waiting.get()) is not None:
            with contextlib.suppress(ConnectionError):
                await self._ws.send_str(json.dumps(message))
        await self._ws.close()


class Visitor:
    """A participant in the process of the server. `heard` are the messages that it was told."""

    def __init__(self, server: RoomServer) -> None:
        self._server = server
        self.heard: list[Message] = []
        self.sid = ""
        self.is_connected = True

    def tell(self, message: Message) -> None:
        if message["on"] == "joined":
            self.sid = message["me"]["sid"]
        if len(self.heard) < MAX_WAITING * 10:
            self.heard.append(message)

    def hang_up(self) -> None:
        self.is_connected = False

    def drop(self) -> None:
        """Lose the connection."""
        self.is_connected = False

    def say(self, **message: Any) -> None:
        """Send what a client would, as `say(do="publish", name="microphone")`."""
        self._server.say(self.sid, message)

    def leave(self) -> None:
        """Hang up."""
        self.is_connected = False
        self._server.leave(self.sid)

    def ticks(self, identity: str) -> list[int]:
        """Return the numbers of the frames that a participant was heard with."""
        return [
            each["what"]["n"]
            for each in self.heard
            if each["on"] == "relay" and each["from"] == identity and each["what"].get("do") == "tick"
        ]
