"""Offers of a second job for a room that is still served, as after an outage of the LiveKit server.

A server that comes back knows no rooms. The callers' clients make them anew, each room gets its automatic
dispatch again, and the old agent comes back to its room 1 to 3 s later. Two agents then talk at once. So a
worker refuses such an offer, and with `terminate`, because the server asks the next worker after a plain
refusal (pkg/service/agentservice.go:440 of livekit-server).

The server never offers that job again, so from the refusal on the worker answers for the room. It looks
whether the agent is back, and has the room dispatched anew if not:

    the old job has ended, or its agent has left    at once
    the worker closes                               at once
    otherwise                                       after BACK_WITHIN

An agent that comes back later still is asked to end, if another one has taken its place. A worker that could
not look and dispatch refuses nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.wire import NUL
from lastcall.worker.jobs import Job, Jobs
from lastcall.worker.room_service import Participant, RoomService, RoomServiceError

log = logging.getLogger("lastcall.worker")

# Seconds that an agent has to come back. Ours: after 5 s of outage agents were back within 2.6 s.
BACK_WITHIN = 10.0
# Seconds after a registration in which rooms of other workers count. Ours: callers try to come back for some
# ten seconds.
OUTAGE_WITHIN = 30.0
# Seconds for which a look or a dispatch that fails is tried again. Ours: a server that has just come back may
# not answer everything yet, and a caller who has waited longer has hung up.
TRIES_FOR = 60.0
# Seconds between two tries, at first and at most. Ours: a server that is back answers soon.
PAUSE, MAX_PAUSE = 1.0, 8.0
# Seconds for the new agent to come after the old one is back. Ours: a process that has to start takes 3 s.
REPLACED_WITHIN = 20.0
# The attribute of a dispatch that lastcall itself has asked for, for a call that is to go on elsewhere. With
# an older livekit-protocol a worker can't see it, would refuse such a dispatch too, and so refuses nothing.
OURS = "lastcall.call"
ROOM_JOB = 0  # livekit.protocol's JT_ROOM: jobs of other types are made for each participant of a room

Served = tuple[str, str, str]  # name and sid of a room, and the name of the agent


class SecondJobs:
    """Decides on offers for rooms that are served. `service` returns None where the server can't be asked.

    `ask` has a job asked to shut down. While `is_closing`, nothing is waited for.
    """

    def __init__(
        self,
        jobs: Jobs,
        changed: Condition,
        service: Callable[[], RoomService | None],
        *,
        ask: Callable[[Job], None],
        is_closing: Callable[[], bool],
    ) -> None:
        self._jobs = jobs
        self._changed = changed
        self._service = service
        self._ask = ask
        self._is_closing = is_closing
        self._beside: list[Served] = []
        self._beside_until = 0.0
        self._given_up: set[Job] = set()
        # When the look for a room and a name of an agent is due.
        self._look_at: dict[tuple[str, str], float] = {}

    def beside(self, rooms: list[str]) -> None:
        """Note the rooms that other workers serve at this registration."""
        self._beside = [(name, sid, agent) for name, sid, agent in (room.split(NUL) for room in rooms)]
        self._beside_until = now() + OUTAGE_WITHIN

    def is_second(self, offer: Any) -> bool:
        """Tell whether an agent of this supervisor is in the offered room, in an older session of it."""
        attributes = getattr(offer, "attributes", None)  # an older livekit-protocol has no such field
        if offer.type != ROOM_JOB or attributes is None or OURS in attributes or self._is_closing():
            return False
        return bool(self._own(offer) or self._others(offer)) and self._service() is not None

    async def see_back(self, offer: Any) -> None:
        """Give the agent of a served room time to come back, and else have the server dispatch anew."""
        room, agent_name = offer.room.name, offer.agent_name
        log.warning("a second job for a room is refused: its agent is served here", extra={"room": room})
        is_waited_for = (room, agent_name) in self._look_at
        self._look_at[room, agent_name] = now() + BACK_WITHIN
        if is_waited_for:  # after another outage, within seconds of the last one
            return
        jobs, others = self._own(offer), self._others(offer)
        try:
            await self._changed.until(
                lambda: self._is_closing() or not (others or any(map(self._may_return, jobs))),
                lambda: self._look_at[room, agent_name],
            )
            dispatched_at = await self._dispatch_anew(offer, jobs, others)
        finally:
            del self._look_at[room, agent_name]
        if dispatched_at is not None:
            await self._end_late(offer, jobs, dispatched_at)

    async def _dispatch_anew(self, offer: Any, jobs: list[Job], others: list[Served]) -> float | None:
        """Dispatch a room anew that has a caller and no agent; return when, or None if it was not."""
        room, agent_name = offer.room.name, offer.agent_name
        # The jobs of other workers are known by name only.
        identities = set() if others else {job.presence.identity for job in jobs} - {""}
        attributes = {**offer.attributes, OURS: offer.id}
        until, pause = now() + TRIES_FOR, PAUSE
        while True:
            looked_at = now()
            is_last = self._is_closing() or looked_at >= until
            try:
                service = self._service()
                if service is None:
                    return None
                people = await service.participants(room)
                if any(_is_agent(each, agent_name, identities) for each in people):
                    self._note_back(offer, jobs, others)
                    return None
                if not any(each.keeps_open for each in people):
                    return None  # nobody waits there, and a dispatch would make a room that is gone
                self._given_up = {job for job in self._given_up if job in self._jobs.running} | set(jobs)
                self._beside = [each for each in self._beside if each not in others]
                identities = set()  # a request without an answer may have been heard: then a new agent comes
                deployment = getattr(offer, "deployment", "")
                await service.create_dispatch(room, agent_name, offer.metadata, deployment, attributes)
            except RoomServiceError as error:
                log.warning(
                    "a room whose agent may not be back can't be looked at, or dispatched anew",
                    extra={"room": room, "error": str(error)},
                )
            else:
                log.warning("an agent is not back, and its room is dispatched anew", extra={"room": room})
                return looked_at
            if is_last:
                return None
            await self._sleep(pause)
            pause = min(pause * 2, MAX_PAUSE)

    async def _end_late(self, offer: Any, jobs: list[Job], since: float) -> None:
        """Ask the old jobs to end whose agents come back although their room was dispatched anew."""

        def back() -> list[Job]:
            return [job for job in jobs if self._may_return(job) and _is_back(job, since)]

        await self._changed.until(
            lambda: self._is_closing() or back() or not any(map(self._may_return, jobs))
        )
        until, old = now() + REPLACED_WITHIN, {job.presence.identity for job in jobs}
        while back() and not self._is_closing() and now() < until:
            if await self._is_replaced(offer, old):
                for job in back():
                    log.warning("an agent is back too late, and is asked to end", extra={"job_id": job.id})
                    self._ask(job)
                return
            await self._sleep(PAUSE)

    async def _sleep(self, seconds: float) -> None:
        """Wait, but not in a worker that closes."""
        at = now() + seconds
        await self._changed.until(self._is_closing, lambda: at)

    async def _is_replaced(self, offer: Any, old: set[str]) -> bool:
        service = self._service()
        if service is None:
            return False
        try:
            people = await service.participants(offer.room.name)
        except RoomServiceError:
            return False  # the next look says more
        return any(_is_agent(each, offer.agent_name, set()) and each.identity not in old for each in people)

    def _own(self, offer: Any) -> list[Job]:
        """Return the jobs of this worker whose agents may come back to the offered room."""
        return [
            job
            for job in self._jobs.running
            if _is_meant(offer, (job.room, job.room_sid, job.agent_name))
            and job not in self._given_up
            and self._may_return(job)
        ]

    def _others(self, offer: Any) -> list[Served]:
        """Return the rooms of other workers whose agents may come back to the offered one."""
        return [each for each in self._beside if _is_meant(offer, each)] if now() < self._beside_until else []

    def _may_return(self, job: Job) -> bool:
        is_ending = job.is_over or job.was_told_to_end or job.has_ended
        return job in self._jobs.running and job.presence.is_in_room and not is_ending

    def _note_back(self, offer: Any, jobs: list[Job], others: list[Served]) -> None:
        """Know the session of the room in which its agent is now: further dispatches to it are meant."""
        for job in jobs:
            job.room_sid = offer.room.sid
        self._beside = [
            (each[0], offer.room.sid, each[2]) if each in others else each for each in self._beside
        ]


def _is_meant(offer: Any, served: Served) -> bool:
    room, sid, agent_name = served
    return (room, agent_name) == (offer.room.name, offer.agent_name) and sid != offer.room.sid


def _is_agent(each: Participant, agent_name: str, identities: set[str]) -> bool:
    """Tell whether a participant is an agent of one of the identities, or of the name where none is known."""
    return each.is_agent and (each.identity in identities if identities else each.agent_name == agent_name)


def _is_back(job: Job, since: float) -> bool:
    """Tell whether a job says that it is in its room, and has joined or reconnected since a moment."""
    presence = job.presence
    return not presence.is_away and max(presence.joined_at or 0.0, presence.reconnected_at or 0.0) >= since
