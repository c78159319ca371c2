"""Offers of a second job for a room that is still served, as after an outage of the LiveKit server.

A server that comes back knows no rooms. The callers' clients make them anew, each room gets its automatic
dispatch again, and the old agent comes back to its room 1 to 3 s later. Two agents then talk at once. So a
worker refuses such an offer, and with `terminate`, because the server asks the next worker after a plain
refusal (pkg/service/agentservice.go:440 of livekit-server). If the agent is not back in time, its room is
dispatched anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from lastcall.worker.base.clock import now
from lastcall.worker.base.wire import NUL
from lastcall.worker.jobs import Jobs
from lastcall.worker.room_service import RoomService, RoomServiceError

log = logging.getLogger("lastcall.worker")

# Seconds that an agent has to come back. Ours: after 5 s of outage agents were back within 2.6 s.
BACK_WITHIN = 10.0
# Seconds after a registration in which rooms of other workers count. Ours: callers try to come back for some
# ten seconds.
OUTAGE_WITHIN = 30.0
# The attribute of a dispatch that lastcall itself has asked for, for a call that is to go on elsewhere.
OURS = "lastcall.call"
ROOM_JOB = 0  # livekit.protocol's JT_ROOM: jobs of other types are made for each participant of a room


class SecondJobs:
    """Decides on offers for rooms that are served. `service` is None where the server can't be asked."""

    def __init__(self, jobs: Jobs, service: Callable[[], RoomService | None]) -> None:
        self._jobs = jobs
        self._service = service
        self._beside: set[tuple[str, ...]] = set()
        self._beside_until = 0.0
        self._given_up: set[tuple[str, ...]] = set()

    def beside(self, rooms: list[str]) -> None:
        """Note the rooms that other workers serve at this registration."""
        self._beside = {tuple(room.split(NUL)) for room in rooms}
        self._beside_until = now() + OUTAGE_WITHIN

    def is_second(self, offer: Any) -> bool:
        """Tell whether an agent of this supervisor is in the offered room, in an older session of it."""
        if offer.type != ROOM_JOB or OURS in getattr(offer, "attributes", {}):
            return False
        served: set[tuple[str, ...]] = {
            (job.room, job.room_sid, job.agent_name)
            for job in self._jobs.running
            if job.presence.is_in_room and not job.has_ended
        }
        if now() < self._beside_until:
            served |= self._beside
        name, sid, agent_name = offer.room.name, offer.room.sid, offer.agent_name
        return any(
            (room, agent) == (name, agent_name) and old != sid and (room, old, agent) not in self._given_up
            for room, old, agent in served
        )

    async def see_back(self, offer: Any) -> None:
        """Give the agent of a served room time to come back, and else have the server dispatch anew."""
        room, agent_name = offer.room.name, offer.agent_name
        log.warning("a second job for a room is refused: its agent is served here", extra={"room": room})
        await asyncio.sleep(BACK_WITHIN)
        service = self._service()
        if service is None:
            return
        try:
            if await service.has_agent(room, agent_name):
                return
            self._give_up(room, agent_name)  # the next offer for the room is taken
            await service.create_dispatch(room, agent_name, offer.metadata)
        except RoomServiceError as error:
            log.warning(
                "a room whose agent may not be back can't be looked at, or dispatched anew",
                extra={"room": room, "error": str(error)},
            )
        else:
            log.warning("an agent is not back, and its room is dispatched anew", extra={"room": room})

    def _give_up(self, room: str, agent_name: str) -> None:
        sids = {
            job.room_sid for job in self._jobs.running if (job.room, job.agent_name) == (room, agent_name)
        }
        sids |= {sid for name, sid, agent in self._beside if (name, agent) == (room, agent_name)}
        self._given_up |= {(room, sid, agent_name) for sid in sids}
