"""The rooms of the local LiveKit server, as a state that does no I/O.

Each method is told what happened and returns effects, which the owner of the connections performs
(`room_server`). A participant has a connection, and a session of it has a sid: a full reconnect is a new
session of the same identity.

The rules are those of livekit-server 1.13.5; a comment names the file of its source (`pkg/…`) in which a rule
stands. Every figure was measured on that server too.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from livekit.protocol import agent_dispatch, models
from livekit.protocol.agent import Job, JobType

# Where a client of `room` connects.
PATH = "/lastcall-local/room"
# Seconds. A session whose connection broke stays a participant for so long: measured, 20.4 to
# 21.6 s.
GHOST = 20.0
# Seconds that a room stays without participants that are no agents, after the last has left, and where none
# has ever joined: `departure_timeout` and `empty_timeout` of pkg/config/config.go.
DEPARTURE_TIMEOUT = 20
EMPTY_TIMEOUT = 300
# Seconds between two looks of a room at the participants that have never published. The others are told of
# them then, and not before (subscriberUpdateInterval and PushAndDequeueUpdates, pkg/rtc/room.go). Of one that
# has left by then they are never told (measured with livekit-server 1.13.5: 6 of 6).
UNPUBLISHED = 3.0

Reason = models.DisconnectReason
Kind = models.ParticipantInfo.Kind
# Kinds of participants that keep no room open and get no agent: pkg/rtc/participant.go, IsDependent.
DEPENDENT = (Kind.AGENT, Kind.EGRESS)
Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """A session is told something."""

    sid: str
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Hangup:
    """A session is over: it is told why, and its connection is closed."""

    sid: str
    reason: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLeft:
    """The agent of a job is no longer in its room, so the job is terminated."""

    job_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A job is to be offered for a dispatch."""

    room: str
    dispatch_id: str
    type: int
    participant: models.ParticipantInfo | None = None


Effect = Tell | Hangup | AgentLeft | Launch


@dataclass(slots=True, kw_only=True)
class Room:
    """One room. Times are readings of the monotonic clock.

    `agents`: the job of each agent, by identity. `ghosts`: since when a session has no connection.
    `published`: the sessions that have published. `prompt`: those of which the others are told at once.
    `untold`: by identity, what the others are not told yet.
    `left_at`: of the last removal of a participant, an agent's included (pkg/rtc/room.go:1493).
    """

    info: models.Room
    created_at: float
    participants: dict[str, models.ParticipantInfo] = field(default_factory=dict)
    dispatches: dict[str, agent_dispatch.AgentDispatch] = field(default_factory=dict)
    agents: dict[str, str] = field(default_factory=dict)
    ghosts: dict[str, float] = field(default_factory=dict)
    published: set[str] = field(default_factory=set)
    prompt: set[str] = field(default_factory=set)
    untold: dict[str, list[Message]] = field(default_factory=dict)
    told_at: float = 0.0
    was_joined: bool = False
    left_at: float | None = None

    def others(self, identity: str) -> list[models.ParticipantInfo]:
        return [each for name, each in self.participants.items() if name != identity]

    @property
    def is_idle(self) -> bool:
        """Whether only agents are left, which keep no room open (pkg/rtc/room.go, CloseIfEmpty)."""
        return all(each.kind in DEPENDENT for each in self.participants.values())


class Rooms:
    """All rooms of one server, by name."""

    def __init__(self, *, ghost: float = GHOST, unpublished: float = UNPUBLISHED) -> None:
        self._rooms: dict[str, Room] = {}
        self._ghost = ghost
        self._unpublished = unpublished

    def __iter__(self) -> Iterator[Room]:
        return iter(list(self._rooms.values()))

    def get(self, name: str) -> Room | None:
        return self._rooms.get(name)

    def by_session(self, sid: str) -> tuple[Room, models.ParticipantInfo] | None:
        """Return the room and the participant of a session that is in a room."""
        for room in self._rooms.values():
            for each in room.participants.values():
                if each.sid == sid:
                    return room, each
        return None

    def forget_everything(self) -> None:
        """Know no room any more."""
        self._rooms.clear()

    # -- rooms and dispatches -------------------------------------------------------------------------

    def open(self, name: str, now: float, *, automatic: bool) -> tuple[Room, list[Effect]]:
        """Return the room of this name, made if there is none.

        `automatic`: a new room gets a dispatch for the workers without an agent name, also if CreateDispatch
        has made the room (pkg/rtc/room.go, createAgentDispatchesFromRoomAgent).
        """
        room = self._rooms.get(name)
        if room is not None:
            return room, []
        info = models.Room(
            sid=f"RM_{secrets.token_hex(6)}",
            name=name,
            empty_timeout=EMPTY_TIMEOUT,
            departure_timeout=DEPARTURE_TIMEOUT,
            creation_time=int(time.time()),
        )
        room = self._rooms[name] = Room(info=info, created_at=now, told_at=now)
        return room, self.dispatch(room, agent_dispatch.AgentDispatch()) if automatic else []

    def dispatch(self, room: Room, wanted: agent_dispatch.AgentDispatch) -> list[Effect]:
        """Keep a dispatch, and have its jobs offered: one for the room, one for each participant in it.

        A dispatch is offered when it is made, and never again: pkg/rtc/room.go, AddAgentDispatch. Two of the
        same content are two.
        """
        wanted.id = wanted.id or f"AD_{secrets.token_hex(6)}"
        wanted.room = room.info.name
        room.dispatches[wanted.id] = wanted
        effects: list[Effect] = [self._launch(room, wanted.id, JobType.JT_ROOM)]
        for each in room.participants.values():
            if each.kind not in DEPENDENT:
                if each.sid in room.published:
                    effects.append(self._launch(room, wanted.id, JobType.JT_PUBLISHER, each))
                effects.append(self._launch(room, wanted.id, JobType.JT_PARTICIPANT, each))
        return effects

    def link(self, name: str, room_sid: str, job: Job) -> None:
        """Note that a job was assigned: its agent is known by the identity that the worker answered.

        pkg/rtc/room.go, handleNewJobs. A second job of one identity takes the place of the first, so the
        removal of the first agent terminates the job of the second.
        """
        room = self._rooms.get(name)
        if room is not None and room.info.sid == room_sid:
            if job.dispatch_id in room.dispatches:
                room.dispatches[job.dispatch_id].state.jobs.append(job)
            if job.state.participant_identity:
                room.agents[job.state.participant_identity] = job.id

    def delete(self, name: str, reason: int) -> list[Effect]:
        """Close a room: everybody in it is disconnected, and every job of an agent in it terminated."""
        room = self._rooms.pop(name, None)
        if room is None:
            return []
        effects: list[Effect] = []
        for identity in list(room.participants):
            effects += self._remove(room, identity, reason, tell_others=False)
        return effects

    # -- participants ---------------------------------------------------------------------------------

    def join(
        self, name: str, info: models.ParticipantInfo, now: float, *, is_prompt: bool = False
    ) -> list[Effect]:
        """Let a session in. An older session of the identity is removed (pkg/service/roommanager.go:400).

        `is_prompt`: whether the others are told at once, as of a participant that has published.
        """
        room, effects = self.open(name, now, automatic=True)
        if info.identity in room.participants:
            room.left_at = now
        effects += self._remove(room, info.identity, Reason.DUPLICATE_IDENTITY)
        info.sid = f"PA_{secrets.token_hex(6)}"
        info.state = models.ParticipantInfo.State.ACTIVE
        info.joined_at = int(time.time())
        room.participants[info.identity] = info
        room.info.num_participants = sum(each.kind not in DEPENDENT for each in room.participants.values())
        if info.kind not in DEPENDENT:
            room.was_joined = True
            effects += [
                self._launch(room, id, JobType.JT_PARTICIPANT, info) for id in room.dispatches
            ]  # room.go:474
        if is_prompt:
            room.prompt.add(info.sid)
        others = room.others(info.identity)
        # The join answer comes first, with everybody who is there: of two that join at once exactly one sees
        # the other.
        welcome = {
            "on": "joined",
            "room": {"sid": room.info.sid, "name": name, "metadata": room.info.metadata},
            "me": shown(info),
            "others": [shown(each) for each in others],
        }
        effects.append(Tell(sid=info.sid, message=welcome))
        return effects + self._tell_of(
            room, info, {"on": "participant_connected", "participant": shown(info)}
        )

    def leave(self, sid: str, reason: int, now: float) -> list[Effect]:
        """End a session, if it is still one."""
        found = self.by_session(sid)
        if found is None:
            return []
        room, info = found
        effects = self._remove(room, info.identity, reason)
        room.left_at = now
        return effects

    def lose(self, sid: str, now: float) -> None:
        """The connection of a session broke. The session stays for a time, as a ghost."""
        found = self.by_session(sid)
        if found is not None:
            found[0].ghosts[sid] = now

    def expire(self, now: float) -> list[Effect]:
        """End the sessions and the rooms whose time is over."""
        effects: list[Effect] = []
        for room in list(self._rooms.values()):
            if now - room.told_at >= self._unpublished:
                room.told_at = now
                for identity in list(room.untold):
                    effects += self._tell_untold(room, identity)
            for sid, since in list(room.ghosts.items()):
                if now - since >= self._ghost:
                    effects += self.leave(sid, Reason.CONNECTION_TIMEOUT, now)
            if room.is_idle:
                since, time_limit = room.created_at, room.info.empty_timeout
                if room.was_joined and room.left_at is not None:
                    since, time_limit = room.left_at, room.info.departure_timeout
                if now - since >= time_limit:
                    effects += self.delete(room.info.name, Reason.ROOM_CLOSED)
        return effects

    # -- what participants do -------------------------------------------------------------------------

    def update(
        self,
        sid: str,
        *,
        attributes: Mapping[str, str] | None = None,
        metadata: str | None = None,
        name: str | None = None,
        can_publish: bool | None = None,
    ) -> list[Effect]:
        """Change a participant, and tell everybody, the participant too. An empty attribute is deleted."""
        found = self.by_session(sid)
        if found is None:
            return []
        room, info = found
        changed = {}
        for key, value in (attributes or {}).items():
            if info.attributes.get(key, "") != value:
                changed[key] = value
            info.attributes[key] = value
            if not value:
                del info.attributes[key]
        if metadata is not None:
            info.metadata = metadata
        if name is not None:
            info.name = name
        effects: list[Effect] = []
        if can_publish is not None:
            info.permission.can_publish = can_publish
            if not can_publish:
                effects += [each for track in list(info.tracks) for each in self.unpublish(sid, track.sid)]
        message = {"on": "participant_updated", "participant": shown(info), "changed": changed}
        effects.append(Tell(sid=sid, message=message))
        return effects + self._tell_of(room, info, message)

    def publish(self, sid: str, name: str) -> tuple[str, list[Effect]]:
        """Publish an audio track, and return its sid; empty where the participant may not."""
        found = self.by_session(sid)
        if found is None or not found[1].permission.can_publish:
            return "", []
        room, info = found
        track = models.TrackInfo(sid=f"TR_{secrets.token_hex(6)}", name=name)
        info.tracks.append(track)
        room.prompt.add(sid)
        effects = self._tell_untold(room, info.identity)
        if sid not in room.published and info.kind not in DEPENDENT:
            room.published.add(sid)
            effects += [self._launch(room, id, JobType.JT_PUBLISHER, info) for id in room.dispatches]
        message = {
            "on": "track_published",
            "identity": info.identity,
            "track": {"sid": track.sid, "name": name, "muted": False},
        }
        return track.sid, effects + self._tell(room.others(info.identity), message)

    def unpublish(self, sid: str, track_sid: str) -> list[Effect]:
        """Take a track back."""
        found = self.by_session(sid)
        if found is None:
            return []
        room, info = found
        kept = [track for track in info.tracks if track.sid != track_sid]
        del info.tracks[:]
        info.tracks.extend(kept)
        message = {"on": "track_unpublished", "identity": info.identity, "sid": track_sid}
        return self._tell(room.participants.values(), message)

    def mute(self, sid: str, track_sid: str, muted: bool) -> list[Effect]:
        """Mute a track, or let it be heard again."""
        found = self.by_session(sid)
        if found is None:
            return []
        room, info = found
        for track in info.tracks:
            if track.sid == track_sid:
                track.muted = muted
        message = {"on": "track_muted", "identity": info.identity, "sid": track_sid, "muted": muted}
        return self._tell(room.participants.values(), message)

    def relay(self, sid: str, to: Iterable[str], message: Message) -> list[Effect]:
        """Hand a message of one participant to others by identity, to all others where none is named.

        Data, RPC and streams are messages between clients, which the server only hands on.
        """
        found = self.by_session(sid)
        if found is None:
            return []
        room, info = found
        wanted = set(to)
        others = [each for each in room.others(info.identity) if not wanted or each.identity in wanted]
        return self._tell(others, {"on": "relay", "from": info.identity, "what": message})

    def tick(self, sid: str, track_sid: str, message: Message) -> list[Effect]:
        """Hand one frame of audio to the others; of a track that is muted, or not there, none is heard."""
        found = self.by_session(sid)
        if found is None:
            return []
        if not any(track.sid == track_sid and not track.muted for track in found[1].tracks):
            return []
        return self.relay(sid, (), message)

    # -- inside ---------------------------------------------------------------------------------------

    def _remove(self, room: Room, identity: str, reason: int, *, tell_others: bool = True) -> list[Effect]:
        """Take a participant out; the job of an agent is terminated (pkg/rtc/room.go:1425 and 1477)."""
        info = room.participants.pop(identity, None)
        if info is None:
            return []
        room.ghosts.pop(info.sid, None)
        room.info.num_participants = sum(each.kind not in DEPENDENT for each in room.participants.values())
        effects: list[Effect] = [Hangup(sid=info.sid, reason=reason)]
        if tell_others:
            message = {
                "on": "participant_disconnected",
                "identity": identity,
                "sid": info.sid,
                "reason": int(reason),
            }
            untold = room.untold.pop(identity, [])
            if all(each["on"] != "participant_connected" for each in untold):  # else nothing is ever told
                effects += self._tell_of(room, info, message)
        room.published.discard(info.sid)
        room.prompt.discard(info.sid)
        job_id = room.agents.pop(identity, "")
        if job_id:
            effects.append(AgentLeft(job_id=job_id))
        return effects

    def _tell_of(self, room: Room, info: models.ParticipantInfo, message: Message) -> list[Effect]:
        """Tell the others of a participant: at once, or later of one that has never published."""
        room.untold.setdefault(info.identity, []).append(message)
        is_late = self._unpublished > 0 and info.sid not in room.prompt
        return [] if is_late else self._tell_untold(room, info.identity)

    def _tell_untold(self, room: Room, identity: str) -> list[Effect]:
        messages = room.untold.pop(identity, [])
        return [each for message in messages for each in self._tell(room.others(identity), message)]

    def _launch(
        self, room: Room, dispatch_id: str, type: int, participant: models.ParticipantInfo | None = None
    ) -> Launch:
        return Launch(room=room.info.name, dispatch_id=dispatch_id, type=type, participant=participant)

    @staticmethod
    def _tell(to: Iterable[models.ParticipantInfo], message: Message) -> list[Effect]:
        return [Tell(sid=each.sid, message=message) for each in to]


def shown(info: models.ParticipantInfo) -> Message:
    """Return a participant as sessions are told of it."""
    return {
        "sid": info.sid,
        "identity": info.identity,
        "name": info.name,
        "metadata": info.metadata,
        "attributes": dict(info.attributes),
        "kind": int(info.kind),
        "can_publish": info.permission.can_publish,
        "joined_at": info.joined_at,
        "tracks": [{"sid": each.sid, "name": each.name, "muted": each.muted} for each in info.tracks],
    }
