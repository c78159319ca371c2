"""Whether a job is in its room, and what follows when the LiveKit server terminates it. Pure.

The server terminates a job whenever its agent leaves the room, and a full reconnect of the agent counts as
that (pkg/rtc/room.go:1477 of livekit-server). So a termination says in general what the job knows better:

    the room is gone, or comes to its end  the call is over by itself, and work after the call goes on
    within STAYS
    the job joins, or reconnects, or has   the termination was for the session before: nothing follows
    within RECONNECTED
    a reconnection is under way            its end is awaited, for AWAY at most
    the job has not joined after JOINS     the owner of the room has ended it: it is asked to shut down
    the room is there after STAYS          the server does not remove the agent by itself: the job is asked to
                                           shut down, and is cut

A join has several attempts, and each replaces the session of the one before (`EngineInner::connect` in
rtc_engine/mod.rs of livekit's rust-sdks). A job that was asked as one that has not joined, and joins then, is
cut.

A job whose room is gone has `finish` seconds for its work, and in a stop all of grace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Seconds from a termination until it is obeyed. The server removes the agent of a deleted dispatch after 3 s,
# and that of a deleted room at once (pkg/rtc/room.go:225 and 904). Ours: 2 s for a busy machine.
STAYS = 5.0
# Seconds before that moment, in which a reconnection explains the termination. The server notices the new
# session before the old one where the network is bad. Ours: longer than STAYS, and short beside a call.
RECONNECTED = 10.0
# Seconds in which a job that is terminated may still join. An attempt to join has 15 s for its media
# (ICE_CONNECT_TIMEOUT in rtc_engine/rtc_session.rs of rust-sdks). Ours: 5 s for the rest of it.
JOINS = 20.0
# Seconds that a reconnection may take. rust-sdks tells its begin once, makes 10 attempts of 5 to some 25 s
# (`reconnect_task` in rtc_engine/mod.rs), and after a full reconnect that failed tells no end. Ours: longer
# than the attempts.
AWAY = 300.0
# livekit.DisconnectReason of a participant whose room's owner has removed it: PARTICIPANT_REMOVED (also of
# DeleteDispatch) and ROOM_DELETED.
BY_OWNER = frozenset({4, 5})
# livekit.DisconnectReason of an agent whose identity another participant has joined with: DUPLICATE_IDENTITY.
EVICTED = 2

Step = Literal["wait", "ask", "kill"]


@dataclass(slots=True, kw_only=True)
class Presence:
    """The facts about a job and its room. Times are readings of the monotonic clock.

    `joined_at`: of the last join. `reconnected_at`: of the last begin or end of a reconnection. `left_at`:
    the end of the room. `asked_at`: the job was asked to shut down for a termination. `is_away`: a
    reconnection is under way. `sid` and `identity` are the agent's, in its room.
    """

    joined_at: float | None = None
    reconnected_at: float | None = None
    left_at: float | None = None
    reason: int = 0
    terminated_at: float | None = None
    asked_at: float | None = None
    is_away: bool = False
    sid: str = ""
    identity: str = ""

    def take(self, what: str, reason: int, detail: str, now: float) -> None:
        """Note what the job has told."""
        if detail:
            self.sid, _, self.identity = detail.partition(" ")
        match what:
            case "joined":
                self.joined_at, self.left_at, self.is_away = now, None, False
            case "reconnecting" | "reconnected":
                self.reconnected_at = now
                self.is_away = what == "reconnecting"
            case "left":
                self.left_at, self.reason, self.is_away = now, reason, False

    @property
    def has_joined(self) -> bool:
        return self.joined_at is not None

    @property
    def is_in_room(self) -> bool:
        return self.has_joined and self.left_at is None

    @property
    def is_ended_by_server(self) -> bool:
        """Whether the owner of the room has ended the job, while it was in the room or before."""
        if self.left_at is not None:
            return self.reason in BY_OWNER
        return self.asked_at is not None and not self.has_joined

    def next_step(self, now: float, finish: float) -> tuple[Step, float | None]:
        """Return the next step, and its time, or None for no time.

        `kill` is for a job that has had `finish` seconds.
        """
        if self.asked_at is not None:
            return "kill", self.asked_at + finish
        if self.left_at is not None:
            return "kill", self.left_at + finish
        if self.terminated_at is None:
            return "wait", None
        if not self.has_joined:
            return "ask", self.terminated_at + JOINS
        look_at = self.terminated_at + STAYS
        if self.joined_at is not None and self.joined_at >= self.terminated_at:
            return "wait", None
        if self.reconnected_at is not None:
            if self.is_away:
                return "ask", max(look_at, self.reconnected_at + AWAY)
            if self.reconnected_at >= look_at - RECONNECTED:
                return "wait", None
        return "ask", look_at
