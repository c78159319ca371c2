"""The handover of calls: the worker of the leaving agent has another job go on with a call.

    1. the old agent gets ready (`prepared`)
    2. the worker asks the LiveKit server for a dispatch to the same room, with the next epoch of the call,
       the identity of the new agent and a secret
    3. the new agent joins, and gets the capsule from the old one (`seen`); nobody has taken the dispatch if
       that takes longer than `patience`
    4. the new agent is ready, and the old one is silent (`silent`)
    5. the new agent speaks and says so (`speaks`), and the old job ends

Until step 4 the old agent goes on. After a failure the old agent refuses this epoch for good, and the
dispatch is deleted. From step 4 on the old agent is silent. It leaves when it sees that the new one speaks.
If that takes too long the old agent is told to refuse the new one, and this worker decides from the answer
on. The old agent leaves if the server shows that the new one speaks. Else the old agent speaks again when the
new one is out of the room. So two agents never speak, and one does in the end.

A worker stops to hand over when its key may not dispatch. It does so too when a dispatch was taken by a
worker without lastcall, of which the server tells. That agent is removed, and until then two agents talk.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lastcall.worker.base import succession
from lastcall.worker.base.clock import never, now
from lastcall.worker.base.condition import Condition
from lastcall.worker.base.plurals import counted
from lastcall.worker.base.settings import HandoverSettings
from lastcall.worker.base.succession import Succession, successor_identity
from lastcall.worker.base.wire import (
    AskHandover,
    AskRemoval,
    BeginHandover,
    CallHears,
    CallKeeps,
    CallStep,
    CancelHandover,
    HandoverOff,
    HandoverOver,
    HandoverResult,
    JobHandover,
    JobKeeps,
    LeaveRoom,
    Removed,
    TakeBack,
)
from lastcall.worker.jobs import Job, Jobs
from lastcall.worker.presence import EVICTED
from lastcall.worker.room_service import AGENT_NAME, Participant, RoomService, RoomServiceError

log = logging.getLogger("lastcall.worker")

# Seconds for the capsule of an agent that is not busy. Ours: a function of `call.keep` has one.
PREPARED_WITHIN = 3.0
# Seconds for a new agent that has the capsule to be ready to speak. Ours: a session starts within a second.
READY_WITHIN = 10.0
# Seconds from the old agent's silence until the new one has to speak. Ours: an agent may speak for a second
# after the answer (`arriving.LEASE`), and half a second on top for a busy machine.
SPEAKS_WITHIN = 1.5
# Seconds for an old agent to answer. Ours: it takes a millisecond.
ANSWERS_WITHIN = 1.5
# Seconds between two tries to remove a successor, or to look at the room.
LOOK_AGAIN_AFTER = 0.25
# Seconds for which a removal is tried. Ours: an outage of a server takes longer, and the caller hangs up.
REMOVED_WITHIN = 30.0
# Seconds for a room to show that the new agent speaks, where the old one has gone meanwhile.
SHOWN_WITHIN = 3.0
# Seconds for which the room is looked at further then, so that a late takeover is told, or an agent removed
# that comes late. Ours: more than READY_WITHIN, and than the start of a process takes.
LATE_WITHIN = 15.0
# Calls that one worker hands over at a time, and seconds that each round takes. Ours: 50 calls in the 5 s
# that a grace of 10 s leaves. A handover takes 0.6 s, and on a busy machine twice that.
PARALLEL, SECONDS_EACH = 10, 1.5
# Seconds after a handover for which calls that wait for theirs may go on, once the drain is over. Ours: as
# SECONDS_EACH. Where nobody takes a call any more, its callbacks have all of the close.
TAKEN_WITHIN = 1.5
# Seconds for a good moment that each call has at least, when the time of a stop is short.
WAIT_AT_LEAST = 0.5
# Seconds between the begins of two tries to hand over a call, and after a round in which nobody took a call.
# A try that has waited for a successor for so long is followed by the next at once.
TRY_AGAIN_AFTER = 1.0
# Dispatches that are remembered, so that none is taken twice.
MAX_TAKEN = 10_000
# livekit.protocol's JT_ROOM: jobs of other types are made for each participant of a room.
ROOM_JOB = 0
# livekit.DisconnectReason of an agent whose call is over: CLIENT_INITIATED, ROOM_DELETED and ROOM_CLOSED.
# After every other one a caller may be in the room: the network was lost, or a successor had the agent
# removed.
ENDED_WELL = frozenset({1, 5, 10})
CLOUD = ".livekit.cloud"
NOBODY = "nobody took it"
GIVEN_BACK = "the worker that took it gave it back"
NO_TIME = "no time was left for it"


@dataclass(slots=True, kw_only=True)
class Try:
    """One try to hand over a call. `steps` are those that the old agent has told of this epoch.

    `beside`: the agents of the room before the dispatch, or None where the server does not say.
    """

    epoch: int
    identity: str
    secret: str = field(repr=False)
    wait: float = 0.0
    steps: dict[str, CallStep] = field(default_factory=dict)
    dispatch_id: str = ""
    beside: frozenset[str] | None = None

    def has(self, *steps: str) -> bool:
        return any(step in self.steps for step in steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a try ended. `successor` is the job that has the call now."""

    result: HandoverResult
    reason: str = ""
    successor: str = ""


def refused(reason: str) -> Outcome:
    return Outcome(result="refused", reason=f"not possible: {reason}")


def failed(reason: str) -> Outcome:
    return Outcome(result="failed", reason=reason)


class Handovers:
    """Hands over the calls of one worker. `service` returns None where the server can't be asked.

    `say` tells a call something, and returns whether there is a call that hears.
    """

    def __init__(
        self,
        jobs: Jobs,
        changed: Condition,
        service: Callable[[], RoomService | None],
        *,
        settings: HandoverSettings,
        url: Callable[[], str],
        say: Callable[[str, CallHears], bool],
        report: Callable[[JobHandover | JobKeeps | HandoverOff], None],
        begin: Callable[[Any], None],
        is_closing: Callable[[], bool],
    ) -> None:
        # Why the calls of an agent name are not handed over any more.
        self.off: dict[str, str] = {}
        self._jobs = jobs
        self._changed = changed
        self._service = service
        self._settings = settings
        self._url = url
        self._say = say
        self._report = report
        self._begin = begin
        self._is_closing = is_closing
        self._tries: dict[str, Try] = {}
        # When the last call was handed over, the calls whose last try was refused, and until when calls may
        # wait for a try.
        self._taken_at = float("-inf")
        self._refused: set[str] = set()
        self._wait_until: Callable[[], float | None] = never
        self._keeps: dict[str, CallKeeps] = {}
        self._untold: set[str] = set()
        # The jobs of which is told that their time is over. Only a late success is told of them.
        self._late: set[str] = set()
        self._gives_back = False
        self._taken: dict[tuple[str, int], None] = {}

    # -- what others ask ------------------------------------------------------------------------------

    def hear(self, job_id: str, message: CallKeeps | CallStep | AskHandover | AskRemoval) -> None:
        """Take what a call says."""
        match message:
            case CallKeeps():
                self._keeps[job_id] = message
                self._untold.add(job_id)
            case CallStep():
                attempt, job = self._tries.get(job_id), self._jobs.get(job_id)
                if attempt is not None and attempt.epoch == message.epoch:
                    if message.step == "silent" and not attempt.has("silent"):
                        attempt.steps.pop("lost", None)  # it is back: a successor has asked
                    attempt.steps[message.step] = message
                    if message.step == "speaks" and job is not None:
                        self._done(job, attempt)  # here, because the end of the job may follow at once
                elif message.step == "withdrawn" and job is not None:
                    job.withdraw()
                    if self._gives_back:
                        self._begin(self._delete_dispatch(job, job.dispatch_id))
                elif message.step == "returned":
                    self._begin(self._remove_returned(job_id, message.detail))
                elif message.step == "silent":  # the agent had hung, and its try is over
                    self._begin(self._end_silence(job_id, message))
            case AskHandover(id=id, reason=reason):
                self._begin(self._answer(job_id, id, reason or "the agent asked for it"))
            case AskRemoval(id=id, sid=sid):
                self._begin(self._remove_predecessor(job_id, id, sid))
        self._changed.notify()

    def tell_keeps(self) -> None:
        """Report the capsules that have changed since the last time."""
        for job_id in self._untold:
            keeps = self._keeps.get(job_id)
            if keeps is not None:
                self._report(JobKeeps(id=job_id, size=keeps.size, kept_at=keeps.kept_at, lacks=keeps.lacks))
        self._untold.clear()

    def forget(self, job_id: str) -> None:
        """Forget a job that has ended."""
        self._keeps.pop(job_id, None)
        self._untold.discard(job_id)
        self._late.discard(job_id)
        self._refused.discard(job_id)

    def is_taken(self, found: Succession) -> bool:
        """Tell whether a dispatch was taken here before, and remember it: the server may repeat one."""
        key = (found.call, found.epoch)
        if key in self._taken:
            return True
        self._taken[key] = None
        if len(self._taken) > MAX_TAKEN:
            del self._taken[next(iter(self._taken))]
        return False

    def lacks(self, job: Job) -> str:
        """Return why a call can't be handed over; empty when it can."""
        settings, keeps = self._settings, self._keeps.get(job.id)
        host = urlsplit(self._url()).hostname or ""
        count = 0 if job.succession is None else job.succession.count
        if job.agent_name in self.off:
            return self.off[job.agent_name]
        if not settings.enabled:
            return "handover.enabled is false"
        if host.endswith(CLOUD) and not settings.on_cloud:
            return "not tried on LiveKit Cloud; handover.enabled = true switches it on"
        if job.type != ROOM_JOB:
            return "the job is not one of a room"
        if not job.has_process:
            return "the job is in a thread"
        if keeps is None:
            return "no call.keep"
        if keeps.lacks:
            return keeps.lacks
        if count >= settings.limit:
            return f"handed over {counted(count, 'time')} already, and handover.limit is {settings.limit}"
        if not job.presence.is_in_room or job.presence.is_away:
            return "the agent is not in its room"
        if job.successor or job.was_told_to_end or job.is_over or job.has_ended:
            return "the call is ending"
        if job.id in self._tries:
            return "another handover is under way"
        if self._service() is None:
            return "no URL or key of the LiveKit server"
        return ""

    async def hand_over(self, job: Job, reason: str, wait: float | None = None) -> Outcome:
        """Hand over one call, and report how that ended.

        `wait`: seconds for a good moment, those of `[handover] wait` where it is None.
        """
        lack = self.lacks(job)
        if lack:
            outcome = refused(lack)
        else:
            job.epoch += 1
            attempt = Try(
                epoch=job.epoch,
                identity=successor_identity(job.presence.identity, job.epoch),
                secret=secrets.token_hex(16),
                wait=self._settings.wait if wait is None else wait,
            )
            self._tries[job.id] = attempt
            try:
                outcome = await self._try(job, attempt, reason)
            except Exception:  # it must end neither the handovers of others nor the wait for this one
                log.exception("a handover has failed", extra={"job_id": job.id})
                outcome = await self._after_a_fault(job, attempt)
            except BaseException:
                self._say(job.id, CancelHandover(epoch=attempt.epoch))
                raise
            finally:
                del self._tries[job.id]
        self._note(job, outcome, reason)
        return outcome

    async def _after_a_fault(self, job: Job, attempt: Try) -> Outcome:
        """End a try in which lastcall has failed: no agent may stay silent for it."""
        self._say(job.id, CancelHandover(epoch=attempt.epoch))
        await self._until(job, attempt, ANSWERS_WITHIN, "cancelled", "speaks")
        try:
            if attempt.has("silent"):
                return await self._confirm(job, attempt)
            await self._end_successor(job, attempt)
        except Exception:  # a silent agent decides by itself then (`leaving.SILENT_AT_MOST`)
            log.exception("a handover can't be ended", extra={"job_id": job.id})
        return failed("fault in lastcall")

    async def hand_over_all(self, reason: str, until: Callable[[], float | None]) -> None:
        """Hand over every call that can be, a few at a time. One that fails is tried again behind the others.

        Ends when no such call is left, or the time is over.
        """
        running: dict[asyncio.Task[Outcome], Job] = {}
        given_up, again_at, width = set[str](), dict[str, float](), PARALLEL

        def waiting() -> list[Job]:
            at = until()
            if self._is_closing() or (at is not None and now() >= at):
                return []
            busy = given_up | {job.id for job in running.values()}
            calls = [job for job in self._jobs.running if job.id not in busy and not self.lacks(job)]
            return sorted(calls, key=lambda job: again_at.get(job.id, 0.0))

        def first() -> list[Job]:
            free = width - len(running)  # every change asks for them, and mostly none is free
            return waiting()[:free] if free > 0 else []

        def due() -> list[Job]:
            return [job for job in first() if again_at.get(job.id, 0.0) <= now()]

        def next_at() -> float | None:
            calls = first()
            times = [again_at.get(job.id, 0.0) for job in calls]
            at = None if running else until()
            return min(times if at is None else [*times, at], default=None)

        def wait() -> float:
            """Return the seconds for a good moment: in a short time all calls have to have one."""
            at, rounds = until(), -(-(len(running) + len(waiting())) // PARALLEL)
            if at is None:
                return self._settings.wait
            return min(self._settings.wait, max(WAIT_AT_LEAST, (at - now()) / max(1, rounds) - SECONDS_EACH))

        def has_changed() -> bool:
            return any(task.done() for task in running) or bool(due()) or not (running or waiting())

        async with asyncio.TaskGroup() as group:
            while running or waiting():
                for job in due():
                    task = group.create_task(self.hand_over(job, reason, wait()))
                    task.add_done_callback(lambda _task: self._changed.notify())
                    running[task] = job
                    again_at[job.id] = now() + TRY_AGAIN_AFTER
                await self._changed.until(has_changed, next_at)
                for task in [each for each in running if each.done()]:
                    job, outcome = running.pop(task), task.result()
                    if outcome.reason == GIVEN_BACK:
                        again_at[job.id] = now()
                    elif outcome.result == "refused":
                        given_up.add(job.id)
                    elif outcome.reason == NOBODY:
                        width = max(1, width - 1)
                    elif outcome.result == "done":
                        width = min(PARALLEL, width + 1)

    def give_back(self) -> None:
        """Delete the dispatches of successors that leave again, because this worker is being stopped.

        One that has no process yet would leave too. Until it could, its call would have no other successor,
        and in a short grace none at all. One that leaves before it has published anything may never be shown
        to its predecessor (pkg/rtc/room.go, PushAndDequeueUpdates), which can't say then that it has left.
        """
        self._gives_back = True
        for job in self._jobs:
            if job.succession is not None and not job.launched:
                self._begin(self._delete_dispatch(job, job.dispatch_id))

    async def before(self, drain_at: Callable[[], float | None], late_at: Callable[[], float | None]) -> None:
        """Hand over the calls that would be cut at the end of a drain.

        Returns when the drain is over. Calls that still wait for their turn go on until `late_at`, for as
        long as others of them are taken.
        """

        def until() -> float | None:
            return late_at() if now() < self._taken_at + TAKEN_WITHIN else drain_at()

        def due_at() -> float | None:
            at, calls = drain_at(), len([job for job in self._jobs.running if not self.lacks(job)])
            if at is None or not calls:
                return at
            settings = self._settings
            rounds = -(-calls // PARALLEL)
            return at - settings.wait - settings.patience - rounds * SECONDS_EACH

        self._wait_until = until
        try:
            while (at := until()) is None or now() < at:
                await self._changed.until(self._is_closing, due_at)
                if self._is_closing():
                    return
                await self.hand_over_all("the end of grace", until)
                await self._sleep(TRY_AGAIN_AFTER)
        finally:
            self._wait_until = never

    def note_late(self, job: Job, *, is_last: bool) -> None:
        """Say of a call that it is not handed over, because its time is over before its first try.

        With `is_last` also of one whose handover is under way: its job is about to be killed.
        """
        was_tried = job.epoch > (0 if job.succession is None else job.succession.epoch)
        is_late = is_last and job.id in self._tries
        if not was_tried and job.id in self._keeps:
            is_late = not self.lacks(job)
        if is_late and not job.successor and job.id not in self._late:
            self._note(job, failed(NO_TIME), "the end of grace")
            self._late.add(job.id)

    def due_at(self, job_id: str) -> float:
        """Return until when a job is not asked to shut down, once the drain is over.

        That is a moment from now while its call is handed over, or waits for its turn.
        """
        return now() + LOOK_AGAIN_AFTER if job_id in self._tries or self._waits(job_id) else 0.0

    def _waits(self, job_id: str) -> bool:
        """Tell whether a call may wait for a try, because others are taken."""
        job, at = self._jobs.get(job_id), self._wait_until()
        if job is None or job_id in self._refused or at is None or now() >= at:
            return False
        return not self.lacks(job)

    # -- one try --------------------------------------------------------------------------------------

    def _note(self, job: Job, outcome: Outcome, reason: str) -> None:
        self._refused.discard(job.id)
        if outcome.result == "refused":
            self._refused.add(job.id)
        elif outcome.result == "done":
            self._taken_at = now()
        if job.id in self._late and outcome.result != "done":
            return
        extra = {"job_id": job.id, "room": job.room, "reason": reason}
        if outcome.result == "done":
            log.info("a call is handed over", extra={**extra, "successor": outcome.successor})
        else:
            log.warning("a call is not handed over", extra={**extra, "because": outcome.reason})
        self._report(
            JobHandover(id=job.id, result=outcome.result, reason=outcome.reason, successor=outcome.successor)
        )

    async def _try(self, job: Job, attempt: Try, reason: str) -> Outcome:
        call = _call_of(job)
        order = BeginHandover(
            call=call,
            epoch=attempt.epoch,
            identity=attempt.identity,
            secret=attempt.secret,
            wait=attempt.wait,
        )
        if not self._say(job.id, order):
            return refused("the job does not listen")
        attempt.beside = await self._agents_beside(job)  # while the old agent gets ready
        await self._until(job, attempt, attempt.wait + PREPARED_WITHIN, "prepared", "impossible")
        if attempt.has("impossible"):
            return refused(attempt.steps["impossible"].detail)
        if not attempt.has("prepared"):
            self._say(job.id, CancelHandover(epoch=attempt.epoch))
            return refused("the agent does not answer")
        try:
            attempt.dispatch_id = await self._dispatch(job, attempt, call, reason)
        except RoomServiceError as error:
            # A request without an answer may have been heard. The agent refuses a successor.
            self._say(job.id, CancelHandover(epoch=attempt.epoch))
            if error.status in (401, 403):
                self._switch_off(job, f"the key may not dispatch: {error}")
            return failed(str(error))
        stranger = await self._until_seen(job, attempt)
        if stranger:
            return await self._remove_stranger(job, attempt, stranger)
        why = NOBODY
        if attempt.has("seen"):
            stranger = await self._until_ready(job, attempt)
            why = f"the successor was not ready within {READY_WITHIN:g} s"
        if not attempt.has("silent", "speaks"):
            steps = [attempt.steps[step] for step in ("refused", "lost") if step in attempt.steps]
            why = GIVEN_BACK if stranger == "" else why
            return await self._withdraw(job, attempt, steps[0].detail if steps else why)
        return await self._confirm(job, attempt)

    async def _dispatch(self, job: Job, attempt: Try, call: str, reason: str) -> str:
        service = self._service()
        if service is None:
            raise RoomServiceError("no URL or key of the LiveKit server")
        asked: Any = job.asked
        attributes = dict(asked.attributes)
        succession.taken_from(attributes)
        count = 0 if job.succession is None else job.succession.count
        found = Succession(
            call=call,
            epoch=attempt.epoch,
            count=count + 1,
            predecessor=job.presence.identity,
            identity=attempt.identity,
            secret=attempt.secret,
            reason=reason,
        )
        return await service.create_dispatch(
            asked.room.name,
            asked.agent_name,
            asked.metadata,
            getattr(asked, "deployment", ""),
            {**attributes, **found.attributes()},
            restarts=False,
        )

    async def _confirm(self, job: Job, attempt: Try) -> Outcome:
        """The old agent is silent. Return once one of the two speaks.

        A successor is removed only once the old agent has said that it refuses it. One that hangs says
        nothing: its successor speaks, or leaves by itself.
        """
        if not attempt.has("cancelled"):
            await self._until(job, attempt, SPEAKS_WITHIN, "speaks", "lost")
        until, is_there = now() + REMOVED_WITHIN, True
        while not attempt.has("speaks") and now() < until:
            if self._has_ended(job):
                return await self._left_to_the_successor(job, attempt)
            if not attempt.has("cancelled"):
                self._say(job.id, CancelHandover(epoch=attempt.epoch))
                await self._until(job, attempt, ANSWERS_WITHIN, "cancelled", "speaks")
                if attempt.has("speaks") or self._has_ended(job):
                    continue
            try:
                people = await self._people(job)
                if _speaks(people, job, attempt):
                    return self._done(job, attempt)
                successor = _successor(people, attempt)
                is_there = successor is not None
                if attempt.has("cancelled") and (successor is None or await self._remove(job, successor)):
                    return await self._take_back(job, attempt)
            except RoomServiceError as error:
                log.warning(
                    "a successor that does not speak can't be removed",
                    extra={"job_id": job.id, "error": str(error)},
                )
                if attempt.has("cancelled") and attempt.has("lost"):  # the old agent does not see it any more
                    return await self._take_back(job, attempt)
            await self._sleep(LOOK_AGAIN_AFTER)
        if attempt.has("speaks") or is_there:
            # The server removes a client that hangs after 20 s. So one that is there for longer has got the
            # answer, and speaks: a successor that may not leaves by itself.
            return self._done(job, attempt)
        return failed("the agent does not answer")  # if it wakes it says that it is silent

    async def _take_back(self, job: Job, attempt: Try) -> Outcome:
        self._say(job.id, TakeBack(epoch=attempt.epoch))
        await self._delete_dispatch(job, attempt.dispatch_id)
        await self._until(job, attempt, ANSWERS_WITHIN, "back")
        return failed("the successor did not speak")

    async def _end_silence(self, job_id: str, silent: CallStep) -> None:
        """Have one of the two speak where an old agent that had hung is silent for a try that is over."""
        due, job = now() + REMOVED_WITHIN, self._jobs.get(job_id)
        if job is None:
            return
        if job.successor:
            self._say(job_id, LeaveRoom(epoch=silent.epoch))
            return
        await self._changed.until(lambda: job_id not in self._tries or self._has_ended(job), lambda: due)
        if job_id in self._tries or self._has_ended(job):
            return
        identity = successor_identity(job.presence.identity, silent.epoch)
        attempt = Try(epoch=silent.epoch, identity=identity, secret="", steps={"silent": silent})
        self._tries[job_id] = attempt
        try:
            outcome = await self._confirm(job, attempt)
        finally:
            del self._tries[job_id]
        if outcome.result == "done":
            self._note(job, outcome, "the agent had hung")

    async def _remove_returned(self, job_id: str, who: str) -> None:
        """Remove an agent that was removed before, and has come back without knowing."""
        job, service = self._jobs.get(job_id), self._service()
        sid, _, identity = who.partition(" ")
        if job is None or service is None:
            return
        try:
            await service.remove(job.room, identity, sid)
        except RoomServiceError as error:
            log.warning("an agent can't be removed", extra={"job_id": job_id, "error": str(error)})

    async def _left_to_the_successor(self, job: Job, attempt: Try) -> Outcome:
        """The old agent has gone after its answer. Nobody else can have the call, so the new one stays."""
        until = now() + SHOWN_WITHIN
        while now() < until:
            try:
                if await self._is_seen_speaking(job, attempt, until):
                    return self._done(job, attempt)
                break
            except RoomServiceError as error:
                log.warning("a successor can't be seen", extra={"job_id": job.id, "error": str(error)})
            await self._sleep(LOOK_AGAIN_AFTER)
        return self._left_alone(job, attempt, "the agent died")

    def _left_alone(self, job: Job, attempt: Try, why: str) -> Outcome:
        """Nobody else has the call. A successor that comes late goes on all the same, and is told then."""
        self._begin(self._tell_late(job, attempt))
        return failed(why)

    async def _tell_late(self, job: Job, attempt: Try) -> None:
        until = now() + LATE_WITHIN
        while now() < until and not self._is_closing():
            with suppress(RoomServiceError):
                if _speaks(await self._people(job), job, attempt):
                    self._note(job, self._done(job, attempt), "its agent died, or hangs")
                    return
            await self._sleep(LOOK_AGAIN_AFTER)

    async def _is_seen_speaking(self, job: Job, attempt: Try, until: float) -> bool:
        """Return whether the successor speaks in time; False at once when it is not in the room.

        Raises RoomServiceError when the server can't say.
        """
        while now() < until:
            people = await self._people(job)
            if _speaks(people, job, attempt):
                return True
            if _successor(people, attempt) is None:
                return False
            await self._sleep(LOOK_AGAIN_AFTER)
        return False

    def _done(self, job: Job, attempt: Try) -> Outcome:
        if not attempt.has("speaks"):
            self._say(job.id, LeaveRoom(epoch=attempt.epoch))
        job.successor = attempt.steps["seen"].job if attempt.has("seen") else attempt.identity
        return Outcome(result="done", successor=job.successor)

    async def _withdraw(self, job: Job, attempt: Try, why: str) -> Outcome:
        """End a try before the old agent is silent. It is told first, and then the dispatch is deleted."""
        self._say(job.id, CancelHandover(epoch=attempt.epoch))
        await self._until(job, attempt, ANSWERS_WITHIN, "cancelled", "silent", "speaks", "refused")
        if attempt.has("silent", "speaks"):  # it was silent before the cancel arrived
            return await self._confirm(job, attempt)
        if not attempt.has("cancelled", "refused"):
            return await self._without_the_old_agent(job, attempt, why)
        await self._end_successor(job, attempt)
        return failed(why)

    async def _without_the_old_agent(self, job: Job, attempt: Try, why: str) -> Outcome:
        """End a try whose old agent does not answer: it hangs, has left, or is dead.

        A new agent goes on alone then, after it has removed an old one that hangs. An old one that wakes
        before refuses it. If the call has ended in order, there is nothing to go on with.
        """
        with suppress(RoomServiceError):  # an old one that was removed may leave by itself when it wakes
            if _speaks(await self._people(job), job, attempt):
                return self._done(job, attempt)
        if await self._has_ended_well(job):
            await self._end_successor(job, attempt)
            return failed("the call has ended")
        if attempt.has("seen"):
            with suppress(RoomServiceError):
                if await self._is_seen_speaking(job, attempt, now() + SHOWN_WITHIN):
                    return self._done(job, attempt)
        if self._has_ended(job):
            return self._left_alone(job, attempt, "the agent died")
        if attempt.has("seen"):
            return self._left_alone(job, attempt, why)
        await self._end_successor(job, attempt)
        return failed(why)

    async def _has_ended_well(self, job: Job) -> bool:
        """Tell whether the call has ended in order: the room is gone, or the agent has left it."""
        due = now() + ANSWERS_WITHIN
        if job.has_ended:  # by the kernel; how it ended is known a little later
            await self._changed.until(lambda: job not in self._jobs, lambda: due)
            return job.fate == "finished"
        if job.presence.left_at is None:  # a process may end before its room has told of the end
            return job.is_over and not job.was_told_to_end
        return job.presence.reason in ENDED_WELL

    async def _end_successor(self, job: Job, attempt: Try) -> None:
        await self._delete_dispatch(job, attempt.dispatch_id)
        try:
            successor = _successor(await self._people(job), attempt)
            if successor is not None:
                await self._remove(job, successor)
        except RoomServiceError as error:
            log.warning(
                "a successor can't be removed", extra={"job_id": job.id, "error": str(error)}
            )  # the old agent refuses it

    async def _until_seen(self, job: Job, attempt: Try) -> str | None:
        """Wait until the successor was seen, or has left. Return another agent that took the dispatch.

        Returns "" if the dispatch was given back (`give_back`), and None where there is no such news.
        """
        other = await self._until_news(job, attempt, self._settings.patience, "seen", "lost")
        if attempt.has("seen"):
            return None
        if job.presence.left_at is not None and job.presence.reason == EVICTED:
            return job.presence.identity
        return other

    async def _until_ready(self, job: Job, attempt: Try) -> str | None:
        """Wait until the old agent is silent, or the successor has left. Returns "" if it was given back."""
        within = READY_WITHIN + attempt.wait
        return await self._until_news(job, attempt, within, "silent", "refused", "lost", "speaks")

    async def _until_news(self, job: Job, attempt: Try, within: float, *steps: str) -> str | None:
        """Wait for one of the steps, or for what `_other_agent` returns. Returns None without that."""
        due = now() + within
        looking = asyncio.get_running_loop().create_task(self._other_agent(job, attempt))
        looking.add_done_callback(lambda _task: self._changed.notify())
        try:
            await self._changed.until(
                lambda: attempt.has(*steps) or looking.done() or self._has_ended(job), lambda: due
            )
            return looking.result() if looking.done() else None
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    async def _other_agent(self, job: Job, attempt: Try) -> str:
        """Return the identity of an agent that has taken the dispatch and is not the successor.

        Returns "" once a dispatch that was there is gone. A successor that was seen has taken it.
        """
        was_there = attempt.has("seen")
        while True:
            await asyncio.sleep(LOOK_AGAIN_AFTER)
            with suppress(RoomServiceError):  # the next look says more
                taken_by = await self._taken_by(job, attempt)
                if taken_by == "" and not was_there:
                    continue
                was_there = True
                if taken_by == "" or (not attempt.has("seen") and taken_by not in (None, attempt.identity)):
                    return taken_by

    async def _taken_by(self, job: Job, attempt: Try) -> str | None:
        """Return the identity of the agent that has taken the dispatch, and "" once the dispatch is gone.

        The server names the agent, but 5 s late where a worker has registered since the dispatch before
        (`RoomService.dispatches`). Until then an agent has taken the dispatch which has come since, and for
        which no other dispatch waits. Returns None where nobody has. Raises RoomServiceError.
        """
        service = self._service()
        if service is None:
            return None
        dispatches = await service.dispatches(job.room)
        ours = next((each for each in dispatches if each.id == attempt.dispatch_id), None)
        if ours is None or ours.agents:
            return "" if ours is None else ours.agents[0]
        named = {agent for each in dispatches for agent in each.agents}
        waiting = [each.id for each in dispatches if each.agent_name == job.agent_name and not each.agents]
        if attempt.beside is None or waiting != [attempt.dispatch_id]:
            return None
        agents = await self._agents_beside(job) or frozenset()
        return next(iter(agents - attempt.beside - named), None)

    async def _agents_beside(self, job: Job) -> frozenset[str] | None:
        """Return the agents of the name in the room that show no call; None where the server does not say."""
        try:
            people = await self._people(job)
        except RoomServiceError:
            return None
        return frozenset(
            each.identity
            for each in people
            if each.is_agent
            and each.attributes.get(AGENT_NAME) == job.agent_name
            and succession.CALL not in each.attributes
        )

    async def _remove_stranger(self, job: Job, attempt: Try, identity: str) -> Outcome:
        """End a try whose dispatch another agent has taken; that one is removed, unless the call is its.

        An agent of the same identity as the old one has thrown it out of the room, or is about to.
        """
        reason = "a worker without lastcall, or of an older version, serves the same agent name"
        self._switch_off(job, reason)
        if identity == job.presence.identity:
            self._say(job.id, CancelHandover(epoch=attempt.epoch))
            return refused(reason)
        if not await self._remove_agent(job, identity):
            # DeleteDispatch removes an agent only if it is in the room by then (DeleteAgentDispatch in
            # pkg/rtc/room.go). One that joins later would speak until its worker has ended it, for 15 s.
            self._begin(self._keep_out(job, identity))
        await self._withdraw(job, attempt, "")
        return refused(reason)

    async def _keep_out(self, job: Job, identity: str) -> None:
        """Remove an agent that is to join yet."""
        until = now() + LATE_WITHIN
        while now() < until and not self._is_closing() and not await self._remove_agent(job, identity):
            await self._sleep(LOOK_AGAIN_AFTER)

    async def _remove_agent(self, job: Job, identity: str) -> bool:
        """Remove an agent from the room; tell whether it was there."""
        try:
            for each in await self._people(job):
                if each.is_agent and each.identity == identity:
                    return await self._remove(job, each)
        except RoomServiceError as error:
            log.warning("an agent can't be removed", extra={"job_id": job.id, "error": str(error)})
        return False

    def _switch_off(self, job: Job, reason: str) -> None:
        if job.agent_name not in self.off:
            self.off[job.agent_name] = reason
            self._report(HandoverOff(agent_name=job.agent_name, reason=reason))

    # -- small things ---------------------------------------------------------------------------------

    async def _until(self, job: Job, attempt: Try, within: float, *steps: str) -> None:
        """Wait for one of the steps, or for the end of the job."""
        due = now() + within
        await self._changed.until(lambda: attempt.has(*steps) or self._has_ended(job), lambda: due)

    def _has_ended(self, job: Job) -> bool:
        return job.has_ended or job.is_over or job.presence.left_at is not None or job not in self._jobs

    async def _sleep(self, seconds: float) -> None:
        at = now() + seconds
        await self._changed.until(self._is_closing, lambda: at)

    async def _people(self, job: Job) -> list[Participant]:
        """Return the participants of the room. Raises RoomServiceError."""
        service = self._service()
        if service is None:
            raise RoomServiceError("no URL or key of the LiveKit server")
        return await service.participants(job.room)

    async def _remove(self, job: Job, agent: Participant) -> bool:
        """Remove an agent from the room; tell whether it was there. Raises RoomServiceError."""
        service = self._service()
        return service is not None and await service.remove(job.room, agent.identity, agent.sid)

    async def _delete_dispatch(self, job: Job, dispatch_id: str) -> None:
        service = self._service()
        if service is None or not dispatch_id:
            return
        try:
            await service.delete_dispatch(job.room, dispatch_id)
        except RoomServiceError as error:
            if "not_found" not in str(error):
                log.warning(
                    "a dispatch can't be deleted", extra={"job_id": job.id, "error": str(error)}
                )  # the old agent refuses a successor, and one without a process leaves by itself

    async def _answer(self, job_id: str, id: int, reason: str) -> None:
        job = self._jobs.get(job_id)
        outcome = refused("the job is unknown") if job is None else await self.hand_over(job, reason)
        self._say(job_id, HandoverOver(id=id, result=outcome.result, reason=outcome.reason))

    async def _remove_predecessor(self, job_id: str, id: int, sid: str) -> None:
        """Remove the predecessor of a successor, which does not answer it, and no other participant.

        A successor that has hung may be out of the room itself, and not know. Its predecessor has the call
        then, and stays.
        """
        job, service, is_gone = self._jobs.get(job_id), self._service(), False
        if job is not None and job.succession is not None and service is not None:
            predecessor = job.succession.predecessor
            try:
                if not _may_go_on(await service.participants(job.room), job.succession):
                    log.warning("a successor that has lost its call asks too late", extra={"job_id": job_id})
                else:
                    is_gone = await service.remove(job.room, predecessor, sid)
                    if not is_gone:
                        people = await service.participants(job.room)
                        is_gone = all(each.identity != predecessor for each in people)
            except RoomServiceError as error:
                log.warning(
                    "a predecessor that does not answer can't be removed",
                    extra={"job_id": job_id, "error": str(error)},
                )
        self._say(job_id, Removed(id=id, is_gone=is_gone))


def _successor(people: list[Participant], attempt: Try) -> Participant | None:
    return next((each for each in people if each.is_agent and each.identity == attempt.identity), None)


def _speaks(people: list[Participant], job: Job, attempt: Try) -> bool:
    """Tell whether the successor speaks, or one that has followed it already."""
    call = _call_of(job)
    return any(
        each.is_agent and succession.speaks_at(each.attributes, call) >= attempt.epoch for each in people
    )


def _may_go_on(people: list[Participant], found: Succession) -> bool:
    """Tell whether a successor is in its room, and has not lost the right to speak."""
    agents = [each for each in people if each.is_agent]
    is_there = any(each.identity == found.identity for each in agents)
    return is_there and not succession.is_superseded(
        found.call, found.epoch, [each.attributes for each in agents]
    )


def _call_of(job: Job) -> str:
    return job.id if job.succession is None else job.succession.call
