"""The room of a local job, in the place of livekit's `rtc.Room`: it joins, leaves and reconnects.

It has the public names of `rtc.Room` and connects to `room_server`, which has the rules of a real server.
There is no media: audio is `ticks`. `install` puts it where livekit-agents looks for livekit's room.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
from livekit import rtc

from lastcall.worker.local import ticks
from lastcall.worker.local.participants import (
    DISCONNECTED,
    LocalParticipant,
    Participant,
    Publication,
    RemoteParticipant,
    StreamInfo,
    StreamReader,
)
from lastcall.worker.local.rooms import PATH

# Seconds to be let in, and to leave. livekit's clients give a connection 5 s.
CONNECT_WITHIN = 5.0
LEAVE_WITHIN = 2.0
# Seconds between the tries to come back after a lost connection: livekit's clients try ten times.
RECONNECT_AFTER = (0.3, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
# As `rtc.SimulateScenarioKind` has them; older versions of livekit have no such name.
FULL_RECONNECT = 7

Message = dict[str, Any]
Handler = Callable[[StreamReader, str], Any]
Reason = rtc.DisconnectReason
State = rtc.ConnectionState


class Room(rtc.EventEmitter[Any]):  # type: ignore[misc]  # livekit.rtc is not type-checked
    """One room, of one job."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__()
        # livekit-agents sets the name before the job runs, and 1.3 reads the token and the URL.
        self._info = SimpleNamespace(name="", sid="", metadata="")
        self._token: str | None = None
        self._server_url: str | None = None
        self._local: LocalParticipant | None = None
        self._state = State.CONN_DISCONNECTED
        self._http: aiohttp.ClientSession | None = None
        # A full reconnect has none until it is let in.
        self._ws: aiohttp.ClientWebSocketResponse | None = None
        self._has_ws = asyncio.Event()
        self._is_leaving = False
        self._outgoing: asyncio.Queue[Message] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._byte_handlers: dict[str, Handler] = {}
        self._text_handlers: dict[str, Handler] = {}
        self._streams: dict[tuple[str, str], StreamReader] = {}
        self.remote_participants: dict[str, RemoteParticipant] = {}
        self.e2ee_manager = None

    # -- as rtc.Room has them -------------------------------------------------------------------------

    @property
    async def sid(self) -> str:
        return str(self._info.sid)

    @property
    def name(self) -> str:
        return str(self._info.name)

    @property
    def metadata(self) -> str:
        return str(self._info.metadata)

    @property
    def local_participant(self) -> LocalParticipant:
        if self._local is None:
            raise Exception("cannot access local participant before connecting")
        return self._local

    @property
    def connection_state(self) -> Any:
        return self._state

    @property
    def num_participants(self) -> int:
        return len(self.remote_participants) + self.isconnected()

    @property
    def num_publishers(self) -> int:
        return sum(bool(each.track_publications) for each in self.remote_participants.values())

    @property
    def is_recording(self) -> bool:
        return False

    @property
    def departure_timeout(self) -> float:
        return 20.0

    @property
    def empty_timeout(self) -> float:
        return 300.0

    def isconnected(self) -> bool:
        return bool(self._state != State.CONN_DISCONNECTED)

    async def connect(self, url: str, token: str, options: Any = None) -> None:
        """Join the room of the token. Raises rtc.ConnectError."""
        self._server_url, self._token = url, token
        self._http = aiohttp.ClientSession()
        try:
            welcome = await self._dial()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            await self._http.close()
            raise rtc.ConnectError(
                f"the local server does not let the job into its room: {error!r}"
            ) from error
        self._local = LocalParticipant(welcome["me"], self._send)
        self._take_in(welcome, tell=False)
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        # A session that was started before the connection waits for the event, and is mute until then.
        self._set_state(State.CONN_CONNECTED)

    async def disconnect(self, *, reason: Any = Reason.CLIENT_INITIATED) -> None:
        """Leave the room, and return when the server knows."""
        if not self.isconnected():
            return
        self._is_leaving = True
        await self.local_participant.end_calls()
        self._send(do="leave")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_WITHIN):
                await self._outgoing.join()  # with everything that was said before
        await self._end(reason)

    async def simulate_scenario(self, scenario: int) -> None:
        """Have a full reconnect; of livekit's other scenarios there is none in a local room."""
        if scenario != FULL_RECONNECT:
            raise RuntimeError("a local room simulates the full reconnect alone")
        await self._reconnect(attempts=1)

    def register_byte_stream_handler(self, topic: str, handler: Handler) -> None:
        """Have the streams of a topic handled."""
        _register(self._byte_handlers, topic, handler)

    def unregister_byte_stream_handler(self, topic: str) -> None:
        """Have the streams of a topic ignored again."""
        self._byte_handlers.pop(topic, None)

    def register_text_stream_handler(self, topic: str, handler: Handler) -> None:
        """Have the text streams of a topic handled."""
        _register(self._text_handlers, topic, handler)

    def unregister_text_stream_handler(self, topic: str) -> None:
        """Have the text streams of a topic ignored again."""
        self._text_handlers.pop(topic, None)

    # -- the connection -------------------------------------------------------------------------------

    async def _dial(self) -> Message:
        """Open a connection, and return the join answer."""
        assert self._http is not None and self._server_url is not None
        url = self._server_url.rstrip("/") + PATH
        async with asyncio.timeout(CONNECT_WITHIN):
            headers = {"Authorization": f"Bearer {self._token}"}
            ws = await self._http.ws_connect(url, headers=headers, max_msg_size=0)
            welcome: Message = await ws.receive_json()
        self._ws = ws
        self._has_ws.set()
        return welcome

    async def _read(self) -> None:
        """Handle what the server says, for as long as there is a connection or one can be had."""
        while True:
            await self._has_ws.wait()
            ws = self._ws
            assert ws is not None
            async for frame in ws:
                if self._ws is not ws or frame.type is not aiohttp.WSMsgType.TEXT:
                    break
                message = json.loads(frame.data)
                if message["on"] == "disconnected":
                    await self._end(message["reason"])
                    return
                if message["on"] == "reconnect":  # the server wants a full reconnect
                    break
                self._handle(message)
            if self._is_leaving:
                return
            if self._ws is ws and not await self._reconnect(attempts=len(RECONNECT_AFTER)):
                await self._end(Reason.UNKNOWN_REASON)
                return

    async def _write(self) -> None:
        while True:
            message = await self._outgoing.get()
            try:
                await self._has_ws.wait()
                assert self._ws is not None
                with contextlib.suppress(ConnectionError):
                    await self._ws.send_str(json.dumps(message))
            finally:
                self._outgoing.task_done()

    async def _reconnect(self, *, attempts: int) -> bool:
        """Join anew, as a new session, and publish anew: livekit's full reconnect.

        Everybody else leaves and comes back in the eyes of this client, also if they have not moved.
        """
        old, self._ws = self._ws, None  # from here on nothing that comes on the old connection counts
        self._has_ws.clear()
        self._set_state(State.CONN_RECONNECTING)
        self.emit("reconnecting")
        for number in range(attempts):
            try:
                welcome = await self._dial()
            except (aiohttp.ClientError, TimeoutError, OSError, TypeError):
                await asyncio.sleep(RECONNECT_AFTER[number])
                continue
            if old is not None:
                await old.close()
            for identity in list(self.remote_participants):
                self._gone(identity, None)
            self.local_participant.take(welcome["me"])
            self._take_in(welcome, tell=True)
            self._set_state(State.CONN_CONNECTED)
            self.emit("reconnected")
            # Not awaited: the answers come to the task that may be this one.
            self._tasks.append(asyncio.create_task(self.local_participant.republish()))
            return True
        return False

    async def _end(self, reason: Any) -> None:
        for reader in self._streams.values():
            reader.feed(ConnectionError("the room is disconnected"))
        self._streams.clear()
        if self._ws is not None:
            await self._ws.close()
        if self._http is not None:
            await self._http.close()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if self._state != State.CONN_DISCONNECTED:
            self.local_participant.disconnect_reason = reason
            self._set_state(State.CONN_DISCONNECTED)
            self.emit("disconnected", reason)

    def _send(self, **message: Any) -> None:
        if self.isconnected():
            self._outgoing.put_nowait(message)

    def _set_state(self, state: Any) -> None:
        self._state = state
        self.emit("connection_state_changed", state)

    # -- what the server says -------------------------------------------------------------------------

    def _take_in(self, welcome: Message, *, tell: bool) -> None:
        self._info = SimpleNamespace(**welcome["room"])
        for shown in welcome["others"]:
            self._come(shown, tell=tell)

    def _come(self, shown: Message, *, tell: bool = True) -> None:
        participant = RemoteParticipant(shown)
        self.remote_participants[participant.identity] = participant
        if tell:
            self.emit("participant_connected", participant)
        for track in shown["tracks"]:
            self._track(participant, track)

    def _track(self, participant: RemoteParticipant, shown: Message) -> None:
        track = ticks.RemoteAudioTrack(shown["name"], shown["sid"])
        publication = Publication(sid=shown["sid"], name=shown["name"], track=track, muted=shown["muted"])
        participant.track_publications[publication.sid] = publication
        self.emit("track_published", publication, participant)
        self.emit("track_subscribed", track, publication, participant)

    def _gone(self, identity: str, reason: Any) -> None:
        participant = self.remote_participants.pop(identity, None)
        if participant is not None:
            participant.disconnect_reason = reason
            participant.state = DISCONNECTED
            self.emit("participant_disconnected", participant)

    def _handle(self, message: Message) -> None:
        match message:
            case {"on": "participant_connected", "participant": shown}:
                known = self.remote_participants.get(shown["identity"])
                if known is None or known.sid != shown["sid"]:  # the join answer may have had it
                    self._come(shown)
            case {"on": "participant_disconnected", "identity": identity, "sid": sid, "reason": reason}:
                leaving = self.remote_participants.get(identity)
                if leaving is not None and leaving.sid == sid:  # no later session of the identity
                    self._gone(identity, reason)
            case {"on": "participant_updated", "participant": shown, "changed": changed}:
                self._update(shown, changed)
            case {"on": "published", "sid": sid}:
                self.local_participant.published(sid)
            case {"on": "track_published", "identity": identity, "track": track}:
                participant = self.remote_participants.get(identity)
                if participant is not None:
                    self._track(participant, track)
            case {"on": "track_unpublished", "identity": identity, "sid": sid}:
                self._untrack(identity, sid)
            case {"on": "track_muted", "identity": identity, "sid": sid, "muted": muted}:
                self._mute(identity, sid, muted)
            case {"on": "relay", "from": sender, "what": what}:
                self._relayed(sender, what)

    def _known(self, identity: str) -> Participant | None:
        if self._local is not None and identity == self._local.identity:
            return self._local
        return self.remote_participants.get(identity)

    def _update(self, shown: Message, changed: dict[str, str]) -> None:
        participant = self._known(shown["identity"])
        if participant is None:
            return
        metadata, name, could = participant.metadata, participant.name, participant.can_publish
        participant.take(shown)
        if changed:
            self.emit("participant_attributes_changed", changed, participant)
        if participant.metadata != metadata:
            self.emit("participant_metadata_changed", participant, metadata, participant.metadata)
        if participant.name != name:
            self.emit("participant_name_changed", participant, name, participant.name)
        if participant.can_publish != could:
            self.emit("participant_permissions_changed", participant, participant.can_publish)

    def _untrack(self, identity: str, sid: str) -> None:
        participant = self._known(identity)
        publication = None if participant is None else participant.track_publications.pop(sid, None)
        if publication is None:
            return
        if participant is self._local:
            if hasattr(publication.track, "attach"):
                publication.track.attach("", None)
            self.emit("local_track_unpublished", publication)
        else:
            self.emit("track_unsubscribed", publication.track, publication, participant)
            self.emit("track_unpublished", publication, participant)

    def _mute(self, identity: str, sid: str, muted: bool) -> None:
        participant = self._known(identity)
        publication = None if participant is None else participant.track_publications.get(sid)
        if publication is not None:
            publication.muted = muted
            if publication.track is not None:
                publication.track.muted = muted
            self.emit("track_muted" if muted else "track_unmuted", participant, publication)

    def _relayed(self, sender: str, what: Message) -> None:
        match what:
            case {"do": "tick", "sid": sid, "n": number, "seconds": seconds}:
                participant = self.remote_participants.get(sender)
                publication = None if participant is None else participant.track_publications.get(sid)
                if publication is not None:
                    publication.track.tick(number, seconds)
            case {"do": "data", "data": data, "topic": topic}:
                packet = rtc.DataPacket(
                    data=base64.b64decode(data),
                    kind=rtc.DataPacketKind.KIND_RELIABLE,
                    participant=self.remote_participants.get(sender),
                    topic=topic,
                )
                self.emit("data_received", packet)
            case {"do": "stream", "stream": stream, **rest}:
                self._stream(sender, stream, rest)
            case _:
                self.local_participant.take_relayed(sender, what)

    def _stream(self, sender: str, stream: str, what: Message) -> None:
        key = (sender, stream)
        match what:
            case {"head": head}:
                kind = head.pop("kind")
                handlers = self._text_handlers if kind == "text" else self._byte_handlers
                handler = handlers.get(head["topic"])
                if handler is not None:  # as livekit's room does, a stream without a handler is dropped
                    reader = self._streams[key] = StreamReader(StreamInfo(**head), is_text=kind == "text")
                    handler(reader, sender)
            case {"part": part}:
                if key in self._streams:
                    self._streams[key].feed(base64.b64decode(part))
            case {"end": _}:
                reader_at_end = self._streams.pop(key, None)
                if reader_at_end is not None:
                    reader_at_end.feed(None)


def _register(handlers: dict[str, Handler], topic: str, handler: Handler) -> None:
    if topic in handlers:
        raise ValueError(f"stream handler for topic '{topic}' already set")
    handlers[topic] = handler


def install() -> None:
    """Put the room, its participants and its audio in the place of livekit's, in this process.

    livekit-agents makes the room of a job by `rtc.Room()`, and compares participants with the classes there.
    """
    names: dict[str, Any] = {
        "Room": Room,
        "Participant": Participant,
        "LocalParticipant": LocalParticipant,
        "RemoteParticipant": RemoteParticipant,
        "AudioSource": ticks.AudioSource,
        "LocalAudioTrack": ticks.LocalAudioTrack,
        "AudioStream": ticks.AudioStream,
    }
    for name, ours in names.items():
        setattr(rtc, name, ours)
