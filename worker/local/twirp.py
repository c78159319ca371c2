"""The HTTP side of the local LiveKit server: AgentDispatchService and RoomService, over Twirp.

A request is POST /twirp/livekit.SERVICE/METHOD with JSON or protobuf in the body, and is answered in kind.
Rights are checked as in pkg/service/auth.go: administration of a room needs `roomAdmin` and the name of that
room, and creation or deletion of rooms needs `roomCreate`. Every lack of a right is a 401 `unauthenticated`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from livekit import api
from livekit.protocol import agent_dispatch as dispatching
from livekit.protocol import models
from livekit.protocol import room as rooms

# Bytes, as pkg/config/config.go limits them: 512 KiB of metadata, 64 KiB of attributes. Measured too.
MAX_METADATA = 512 << 10
MAX_ATTRIBUTES = 64 << 10
# HTTP status of each error of Twirp that is used here: https://twitchtv.github.io/twirp/docs/spec_v7.html
STATUS = {
    "unauthenticated": 401,
    "not_found": 404,
    "invalid_argument": 400,
    "malformed": 400,
    "bad_route": 404,
    "unavailable": 503,
}


class Refusal(Exception):
    """Raised by a method that refuses a request; `code` is one of Twirp's."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


@dataclass(frozen=True, slots=True)
class Method:
    """One method: the type of its request, and its implementation, which gets the claims of the token too."""

    request: type[Message]
    run: Callable[[Any, api.Claims], Awaitable[Message]]


def admin(claims: api.Claims, room: str) -> None:
    """Raise Refusal without the right to administer this room."""
    if not (claims.video and claims.video.room_admin and claims.video.room == room):
        raise Refusal("unauthenticated", "permissions denied")


def creator(claims: api.Claims) -> None:
    """Raise Refusal without the right to create and delete rooms."""
    if not (claims.video and claims.video.room_create):
        raise Refusal("unauthenticated", "permissions denied")


def lister(claims: api.Claims) -> None:
    """Raise Refusal without the right to list rooms."""
    if not (claims.video and claims.video.room_list):
        raise Refusal("unauthenticated", "permissions denied")


class Twirp:
    """The routes. `owner` is the `DispatchServer`, which does the work."""

    def __init__(self, verify: Callable[[str], api.Claims | None], owner: Any) -> None:
        self._verify = verify
        self._owner = owner
        self._methods = {
            "AgentDispatchService/CreateDispatch": Method(
                dispatching.CreateAgentDispatchRequest, self._create_dispatch
            ),
            "AgentDispatchService/ListDispatch": Method(
                dispatching.ListAgentDispatchRequest, self._list_dispatch
            ),
            "AgentDispatchService/DeleteDispatch": Method(
                dispatching.DeleteAgentDispatchRequest, self._delete_dispatch
            ),
            "RoomService/CreateRoom": Method(rooms.CreateRoomRequest, self._create_room),
            "RoomService/ListRooms": Method(rooms.ListRoomsRequest, self._list_rooms),
            "RoomService/DeleteRoom": Method(rooms.DeleteRoomRequest, self._delete_room),
            "RoomService/ListParticipants": Method(rooms.ListParticipantsRequest, self._list_participants),
            "RoomService/GetParticipant": Method(rooms.RoomParticipantIdentity, self._get_participant),
            "RoomService/RemoveParticipant": Method(rooms.RoomParticipantIdentity, self._remove_participant),
            "RoomService/UpdateParticipant": Method(rooms.UpdateParticipantRequest, self._update_participant),
            "RoomService/MutePublishedTrack": Method(rooms.MuteRoomTrackRequest, self._mute),
        }

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        try:
            return await self._handle(request)
        except Refusal as refusal:
            body = {"code": refusal.code, "msg": refusal.text}
            return web.json_response(body, status=STATUS[refusal.code])

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        name = f"{request.match_info['service'].removeprefix('livekit.')}/{request.match_info['method']}"
        method = self._methods.get(name)
        if method is None:
            raise Refusal("bad_route", f"no handler for path {request.path!r}")
        claims = self._verify(request.headers.get("Authorization", "").removeprefix("Bearer "))
        if claims is None:
            raise Refusal("unauthenticated", "invalid token")
        is_json = request.content_type == "application/json"
        wanted = method.request()
        try:
            body = await request.read()
            if is_json:
                json_format.Parse(body, wanted, ignore_unknown_fields=True)
            else:
                wanted.ParseFromString(body)
        except (DecodeError, json_format.ParseError, UnicodeDecodeError) as error:
            raise Refusal("malformed", "the request could not be decoded") from error
        answer = await method.run(wanted, claims)
        if is_json:
            text = json_format.MessageToJson(answer, preserving_proto_field_name=True)
            return web.Response(text=text, content_type="application/json")
        return web.Response(body=answer.SerializeToString(), content_type="application/protobuf")

    # -- AgentDispatchService -------------------------------------------------------------------------

    async def _create_dispatch(
        self, wanted: dispatching.CreateAgentDispatchRequest, claims: api.Claims
    ) -> Message:
        self._dispatcher(claims, wanted.room)
        if len(wanted.metadata.encode()) > MAX_METADATA:
            raise Refusal("invalid_argument", "metadata size exceeds limits")
        if sum(len(k.encode()) + len(v.encode()) for k, v in wanted.attributes.items()) > MAX_ATTRIBUTES:
            raise Refusal("invalid_argument", "attributes size exceeds limits")
        dispatch = dispatching.AgentDispatch(
            agent_name=wanted.agent_name,
            metadata=wanted.metadata,
            deployment=wanted.deployment,
            attributes=dict(wanted.attributes),
        )
        return self._owner.create_dispatch(wanted.room, dispatch)  # type: ignore[no-any-return]

    async def _list_dispatch(
        self, wanted: dispatching.ListAgentDispatchRequest, claims: api.Claims
    ) -> Message:
        self._dispatcher(claims, wanted.room)
        room = self._room(wanted.room)
        found = [each for id, each in room.dispatches.items() if wanted.dispatch_id in ("", id)]
        return dispatching.ListAgentDispatchResponse(agent_dispatches=found)

    async def _delete_dispatch(
        self, wanted: dispatching.DeleteAgentDispatchRequest, claims: api.Claims
    ) -> Message:
        self._dispatcher(claims, wanted.room)
        self._room(wanted.room)
        dispatch = self._owner.delete_dispatch(wanted.room, wanted.dispatch_id)
        if dispatch is None:
            raise Refusal("not_found", "dispatch ID not found")
        return dispatch  # type: ignore[no-any-return]

    def _dispatcher(self, claims: api.Claims, room: str) -> None:
        """Raise Refusal without the right to administer this room, which some keys do not have."""
        admin(claims, room)
        if not self._owner.may_dispatch:
            raise Refusal("unauthenticated", "permissions denied")

    def _room(self, name: str) -> Any:
        room = self._owner.rooms.state.get(name)
        if room is None:  # the real server waits for the node of the room before it says so
            raise Refusal("unavailable", "no response from servers")
        return room

    # -- RoomService ----------------------------------------------------------------------------------

    async def _create_room(self, wanted: rooms.CreateRoomRequest, claims: api.Claims) -> Message:
        creator(claims)
        return self._owner.open_room(wanted.name).info  # type: ignore[no-any-return]

    async def _list_rooms(self, wanted: rooms.ListRoomsRequest, claims: api.Claims) -> Message:
        lister(claims)
        found = [
            each.info
            for each in self._owner.rooms.state
            if not wanted.names or each.info.name in wanted.names
        ]
        return rooms.ListRoomsResponse(rooms=found)

    async def _delete_room(self, wanted: rooms.DeleteRoomRequest, claims: api.Claims) -> Message:
        creator(claims)
        if not self._owner.delete_room(wanted.room):
            raise Refusal("not_found", "requested room does not exist")
        return rooms.DeleteRoomResponse()

    async def _list_participants(self, wanted: rooms.ListParticipantsRequest, claims: api.Claims) -> Message:
        admin(claims, wanted.room)
        room = self._owner.rooms.state.get(wanted.room)
        found = [] if room is None else list(room.participants.values())
        return rooms.ListParticipantsResponse(participants=found)

    async def _get_participant(self, wanted: rooms.RoomParticipantIdentity, claims: api.Claims) -> Message:
        admin(claims, wanted.room)
        return self._participant(wanted.room, wanted.identity)

    async def _remove_participant(self, wanted: rooms.RoomParticipantIdentity, claims: api.Claims) -> Message:
        admin(claims, wanted.room)
        if not self._owner.rooms.remove(wanted.room, wanted.identity):
            raise Refusal("not_found", "participant does not exist")
        return rooms.RemoveParticipantResponse()

    async def _update_participant(
        self, wanted: rooms.UpdateParticipantRequest, claims: api.Claims
    ) -> Message:
        admin(claims, wanted.room)
        info = self._participant(wanted.room, wanted.identity)
        state = self._owner.rooms.state
        can_publish = wanted.permission.can_publish if wanted.HasField("permission") else None
        effects = state.update(
            info.sid,
            attributes=dict(wanted.attributes),
            metadata=wanted.metadata or None,
            name=wanted.name or None,
            can_publish=can_publish,
        )
        self._owner.rooms.perform(effects)
        return info

    async def _mute(self, wanted: rooms.MuteRoomTrackRequest, claims: api.Claims) -> Message:
        admin(claims, wanted.room)
        info = self._participant(wanted.room, wanted.identity)
        track = next((each for each in info.tracks if each.sid == wanted.track_sid), None)
        if track is None:
            raise Refusal("not_found", "track is not published")
        self._owner.rooms.perform(self._owner.rooms.state.mute(info.sid, track.sid, wanted.muted))
        return rooms.MuteRoomTrackResponse(track=track)

    def _participant(self, room_name: str, identity: str) -> models.ParticipantInfo:
        room = self._owner.rooms.state.get(room_name)
        info = None if room is None else room.participants.get(identity)
        if info is None:
            raise Refusal("not_found", "participant does not exist")
        return info  # type: ignore[no-any-return]
