"""The arriving agent of a handover: it gets the capsule, and may speak once its predecessor is silent.

`leaving` draws the way of both. The agent joins as any other, if its entrypoint has called `lastcall.call`:
another one would speak at once. `connect` returns when the capsule is there, and `take_over` when the agent
may speak:

    the predecessor answers `takeover`       it is silent from then on, and waits for `speaks` for a second
    the predecessor refuses, or has          the call stays where it is: `Withdrawn`, and the job ends
    cancelled this epoch
    the predecessor does not answer, or is   it is removed from the room, and the call goes on without its
    gone                                     last turns, perhaps without its capsule

An answer that is older than its second gives no right to speak: the predecessor may be speaking again. An
agent that comes back to its room after a full reconnect looks whether it has lost the right meanwhile.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from livekit import rtc

from lastcall.worker.base import succession
from lastcall.worker.base.clock import now
from lastcall.worker.base.succession import Succession
from lastcall.worker.job import deletions
from lastcall.worker.job.leaving import (
    AGENT,
    BACK_WITHIN,
    CAPSULE,
    DEPENDENT_KINDS,
    HELLO,
    NEWER,
    TAKEOVER,
    TURNS,
    leave_now,
)

log = logging.getLogger("lastcall")

# Seconds for the predecessor to answer `hello`. Ours: an RPC takes 50 ms.
ANSWERS_WITHIN = 2.0
# Seconds for a predecessor that does not answer `hello` to answer it or be gone, and between two questions.
# The server shows an agent that has died for 20.4 to 21.6 s.
SHOWN_FOR, SAY_HELLO_AGAIN_AFTER = 25.0, 0.5
# Seconds for the answer to `takeover`, and then for any word of a predecessor that lives. Ours: `on_takeover`
# has a second, and where the answer is lost the worker of the predecessor removes this agent 1.5 s after it
# (`handovers.SPEAKS_WITHIN`). Both must not be removed.
TAKEOVER_WITHIN, LIVES_WITHIN = 2.5, 0.5
# livekit's clients take 7 s for the acknowledgement off this time; what is left is for the handler.
RESPONSE_TIMEOUT = 10.0
# Seconds for the capsule. Ours: 200 kB take 0.2 s.
CAPSULE_WITHIN = 5.0
# Seconds between two questions whether it is a good moment.
ASK_AGAIN_AFTER = 0.05
# Seconds for which an answer gives the right to speak; the predecessor waits for so long.
LEASE = 1.0
# Seconds from the predecessor's end until the successor goes on alone. Ours: a call that ends by itself ends
# with the agent's leave, and the caller's follows.
ALONE_AFTER = 0.5
# Seconds from the right to speak until this agent says that it speaks. Its predecessor is silent then, and
# can take its voice back. Ours: code that fails with the state of a call does so in milliseconds, and every
# handover takes so much longer.
SPEAKS_AFTER = 0.05
# Seconds until each audio track of a caller is subscribed to. Ours: 0.1 s on a server of the same region.
HEARS_WITHIN = 1.0
# Seconds for the predecessor to be gone once the server has removed it, and how often that is tried.
GONE_WITHIN, REMOVALS = 1.0, 3
# Errors of an RPC which say that the other side lives, and does not want.
Code = rtc.RpcError.ErrorCode
REFUSALS = frozenset({Code.APPLICATION_ERROR, Code.UNSUPPORTED_METHOD})
STOPPING = "the worker of the successor is being stopped"


class Withdrawn(Exception):
    """Raised by `connect` and `take_over` in a successor that must not speak: the call stays where it is.

    The job is shut down, and needs to do nothing about that. Since 0.2.0.
    """


class Resumed:
    """The state that the predecessor of this call has left. Since 0.2.0.

    `epoch`: 1 and more. Each try to hand over the call has the next number. `reason`: why the call was handed
    over. `metadata` and `attributes`: those of the dispatch with which the call began, as `ctx.job` has them.
    """

    def __init__(self, *, epoch: int, reason: str, metadata: str, attributes: Mapping[str, str]) -> None:
        self.epoch = epoch
        self.reason = reason
        self.metadata = metadata
        self.attributes = dict(attributes)
        self._state: Any = None
        self._has_state = False

    @property
    def state(self) -> Any:  # any JSON value
        """The value that the predecessor gave to `call.keep`; None if the predecessor died before.

        After `call.take_over()` it is the newest: the predecessor may have kept another one meanwhile. Raises
        RuntimeError before `ctx.connect()` has returned.
        """
        if not self._has_state:
            raise RuntimeError("call.resumed.state is there once ctx.connect() has returned")
        return self._state

    @property
    def is_restored(self) -> bool:
        """Whether `ctx.connect()` has returned. For lastcall."""
        return self._has_state

    def restore(self, state: Any) -> None:
        """Note the state. For lastcall."""
        self._state, self._has_state = state, True


class Arriving:
    """The arriving side of one call. `remove` has the server remove the predecessor; it returns success."""

    def __init__(
        self,
        found: Succession,
        resumed: Resumed,
        *,
        job: str,
        remove: Callable[[str], Awaitable[bool]],
        withdraw: Callable[[], None],
        is_stopping: Callable[[], bool] = lambda: False,
        may_speak: Callable[[float], Awaitable[bool]] | None = None,
        is_asked_for: Callable[[], bool] = lambda: True,
    ) -> None:
        self.succession = found
        self.resumed = resumed
        self.may_speak = False
        # Why this agent has to leave again.
        self.withdrawn = ""
        self._job = job
        self._remove = remove
        self._withdraw = withdraw
        self._is_stopping = is_stopping
        self._ask_worker = may_speak
        self._is_asked_for = is_asked_for
        self._room: Any = None
        self._name = ""
        self._parts: dict[str, asyncio.Future[bytes]] = {}
        self._reading: set[asyncio.Task[None]] = set()
        self._left: asyncio.Event = asyncio.Event()
        self._is_removing = False
        self._has_spoken = False
        self._taking = asyncio.Lock()
        self._turns: Any = None

    def attach(self, room: Any, name: str) -> None:
        """Have the `connect` of the room return with the capsule, and listen to the predecessor.

        A successor that has to leave again may delete its room at its end, as agents do. That would end the
        call of its predecessor.
        """
        self._room, self._name = room, name
        deletions.forbid(name)
        loop = asyncio.get_running_loop()
        for topic in (CAPSULE, TURNS, NEWER):
            self._parts[topic] = loop.create_future()
            room.register_byte_stream_handler(topic, functools.partial(self._on_stream, topic))
        room.on("participant_disconnected", self._on_disconnected)
        room.on("participant_connected", self._on_connected)
        room.on("reconnected", self._on_reconnected)
        connect = room.connect

        @functools.wraps(connect)
        async def connected(*arguments: Any, **options: Any) -> Any:
            await self._ended_if_withdrawn(self._may_join())
            result = await connect(*arguments, **options)
            await self._ended_if_withdrawn(self._arrive())
            return result

        room.connect = connected

    async def take_over(self) -> Any:
        """Return the last turns once the agent may speak. Raises Withdrawn."""
        async with self._taking:
            if self.withdrawn:
                raise Withdrawn(self.withdrawn)
            if not self.may_speak:
                self._turns = await self._ended_if_withdrawn(self._take_over())
            return self._turns

    async def aclose(self) -> None:
        """End with the job."""
        for task in self._reading:
            task.cancel()
        await asyncio.gather(*self._reading, return_exceptions=True)

    async def _ended_if_withdrawn(self, work: Awaitable[Any]) -> Any:
        try:
            return await work
        except Withdrawn as error:
            self._give_up(str(error))
            raise

    def stop(self) -> None:
        """Leave again because the worker is being stopped, unless nobody else has the call."""
        is_arriving = not (self.may_speak or self.withdrawn or self._taking.locked())
        if is_arriving and self._room.isconnected() and self._predecessor is not None:
            self._give_up(STOPPING)

    def end(self, why: str) -> None:
        """Leave at once because the agent's own code ends the job, unless nobody else has the call.

        A predecessor has the call until this agent has said that it speaks. livekit-agents would stay in the
        room until the session and the callbacks are done, and the entrypoint has 15 s there.
        """
        is_arriving = not (self._has_spoken or self.withdrawn)
        if is_arriving and self._room.isconnected() and self._predecessor is not None:
            self._give_up(why)

    @property
    def serves_a_caller(self) -> bool:
        """Whether this agent has the call, and a caller is in the room."""
        return self.may_speak and self._room.isconnected() and self._has_caller

    def _give_up(self, why: str) -> None:
        """Leave the room, and end the job: the call stays where it is, or has gone elsewhere."""
        if self.withdrawn:  # the code of the agent finds itself out of the room then
            return
        self.withdrawn, self.may_speak = why, False
        log.info("lastcall.call: a successor leaves again", extra={"reason": why})
        deletions.forbid(self._name)
        self._withdraw()
        self._spawn(leave_now(self._room))

    # -- until the capsule is there -------------------------------------------------------------------

    async def _may_join(self) -> None:
        """Raise Withdrawn in the job of an agent that knows nothing of handovers."""
        if self.withdrawn:
            raise Withdrawn(self.withdrawn)
        if not self._is_asked_for():
            log.warning(
                "lastcall.call: a successor leaves before it joins: its entrypoint has to call"
                " lastcall.call(ctx) before ctx.connect()"
            )
            raise Withdrawn("lastcall.call(ctx) was not called")

    async def _arrive(self) -> None:
        found = self.succession
        self._look_for_others()
        state: Any = None
        if await self._is_predecessor_there():
            hello = await self._hello()
            line = None if hello is None else await self._part(CAPSULE, CAPSULE_WITHIN)
            if line is not None:
                state = json.loads(line)
            elif await self._is_predecessor_there():
                raise Withdrawn("the capsule did not come")
        self.resumed.restore(state)
        log.info(
            "lastcall.call: a call has come from another job",
            extra={"epoch": found.epoch, "reason": found.reason, "has_predecessor": not self._left.is_set()},
        )

    async def _hello(self) -> dict[str, Any] | None:
        """Return the predecessor's answer; None once it is gone, or has not answered for too long.

        One that hangs may wake, and one that has died with its worker goes in the end. Raises Withdrawn.
        """
        due = now() + SHOWN_FOR
        while True:
            if self._is_stopping():
                raise Withdrawn(STOPPING)
            if not self._room.isconnected():
                raise Withdrawn("the room is gone")
            answer = await self._ask(HELLO, ANSWERS_WITHIN)
            if answer is not None or self._predecessor is None or now() >= due:
                return answer
            self._look_for_others()
            await asyncio.sleep(SAY_HELLO_AGAIN_AFTER)

    def _look_for_others(self) -> None:
        """Raise Withdrawn where another successor is in the room already, or no caller."""
        if not self._has_caller:
            raise Withdrawn("nobody is in the room")
        found = self.succession
        for each in self._room.remote_participants.values():
            is_other = each.kind == AGENT and each.identity != found.predecessor
            if is_other and succession.epoch_of(each.attributes, found.call) >= found.epoch:
                raise Withdrawn("another successor is in the room")

    @property
    def _has_caller(self) -> bool:
        return any(each.kind not in DEPENDENT_KINDS for each in self._room.remote_participants.values())

    async def _is_predecessor_there(self) -> bool:
        """Tell whether it is in the room: one of the two may be in the middle of a full reconnect."""
        if self._predecessor is None:
            await asyncio.sleep(BACK_WITHIN)
        return self._predecessor is not None

    @property
    def _predecessor(self) -> Any:
        return self._room.remote_participants.get(self.succession.predecessor)

    async def _ask(self, method: str, within: float) -> dict[str, Any] | None:
        """Return the predecessor's answer, or None if it does not answer. Raises Withdrawn if it refuses."""
        found = self.succession
        payload = {"epoch": found.epoch, "secret": found.secret, "job": self._job}
        asking = asyncio.ensure_future(
            self._room.local_participant.perform_rpc(
                destination_identity=found.predecessor,
                method=method,
                payload=json.dumps(payload),
                response_timeout=RESPONSE_TIMEOUT,
            )
        )
        leaving = asyncio.ensure_future(self._left.wait())
        try:
            await asyncio.wait((asking, leaving), timeout=within, return_when="FIRST_COMPLETED")
            if not asking.done():
                return None
            answer = json.loads(asking.result())
            return answer if isinstance(answer, dict) else None
        except rtc.RpcError as error:
            if error.code in REFUSALS:
                raise Withdrawn(f"refused: {error.message}") from None
            return None
        finally:
            leaving.cancel()
            asking.cancel()
            await asyncio.gather(asking, leaving, return_exceptions=True)

    async def _part(self, topic: str, within: float) -> bytes | None:
        """Return what the predecessor sends; None if it does not come."""
        leaving = asyncio.ensure_future(self._left.wait())
        part = self._parts[topic]
        try:
            await asyncio.wait((part, leaving), timeout=within, return_when="FIRST_COMPLETED")
        finally:
            leaving.cancel()
        return part.result() if part.done() else None

    # -- until it may speak ---------------------------------------------------------------------------

    async def _take_over(self) -> Any:
        if not self.resumed.is_restored:
            raise RuntimeError("call.take_over() has to be called after ctx.connect()")
        if not self._room.isconnected():
            raise Withdrawn("the room is gone")
        await self._until_it_hears()
        asked_at = now()
        turns: Any = None
        while self._predecessor is not None:
            if self._is_stopping():
                raise Withdrawn(STOPPING)
            asked_at = now()
            answer = await self._ask(TAKEOVER, TAKEOVER_WITHIN)
            if answer is None:
                # One that is silent, or speaks again, refuses. One that has heard nothing is asked again.
                if self._predecessor is not None and await self._ask(HELLO, LIVES_WITHIN) is not None:
                    continue
                break
            if not answer.get("wait"):
                if NEWER in answer:
                    self.resumed.restore(await self._last(NEWER, answer, self.resumed.state))
                turns = await self._last(TURNS, answer, None)
                until = asked_at + LEASE + float(answer.get("took", 0.0))
                await self._confirmed_by_worker(until - now())
                if now() <= until:
                    return self._speak(turns)
                if await self._is_predecessor_there():
                    raise Withdrawn("too late")
                break
            await asyncio.sleep(ASK_AGAIN_AFTER)
        await self._go_on_alone()
        return self._speak(turns)

    async def _confirmed_by_worker(self, within: float) -> None:
        """Raise Withdrawn where the worker of this job does not answer: it may have been killed.

        A job ends some milliseconds after its worker, and the end of file tells of the end up to 50 ms late.
        The predecessor would go when it hears that this agent speaks, and nobody would have the call.
        """
        lives = self._ask_worker is None or (within > 0 and await self._ask_worker(within))
        if not lives and await self._is_predecessor_there():
            raise Withdrawn("the worker of the successor does not answer")

    async def _last(self, topic: str, answer: dict[str, Any], without: Any) -> Any:
        """Return what the answer holds, or announces; `without` where the predecessor has died meanwhile."""
        line: bytes | None = base64.b64decode(answer[topic])
        if not line:
            line = await self._part(topic, LEASE)
        if line is not None:
            return json.loads(line)
        if await self._is_predecessor_there():
            raise Withdrawn("the last turns did not come")
        return without

    def _speak(self, turns: Any) -> Any:
        """Let this agent speak, and say so. Nothing here awaits: the predecessor's second runs."""
        if self.withdrawn or not self._room.isconnected():
            raise Withdrawn(self.withdrawn or "the room is gone")
        self.may_speak = True
        deletions.permit(self._name)
        self._spawn(self._say_that_it_speaks(SPEAKS_AFTER))
        return turns

    async def _say_that_it_speaks(self, after: float = 0.0) -> None:
        """Say it, unless the agent's code has ended before: the predecessor leaves when it hears this."""
        await asyncio.sleep(after)
        if self.withdrawn:
            return
        self._has_spoken = True
        try:
            me = self._room.local_participant
            await me.set_attributes({succession.SPEAKS: str(self.succession.epoch)})
        except (
            Exception
        ) as error:  # of livekit's client; the worker of the predecessor removes this agent then
            log.warning(
                "lastcall.call: a successor can't say that it speaks", extra={"error": type(error).__name__}
            )

    async def _go_on_alone(self) -> None:
        """Make sure that the predecessor is out of the room. Raises Withdrawn if that can't be had."""
        if self._predecessor is None:
            await asyncio.sleep(ALONE_AFTER)
            if self._predecessor is not None:
                raise Withdrawn("the predecessor is back in the room")
        for _ in range(REMOVALS):
            predecessor = self._predecessor
            if predecessor is None:
                break
            self._is_removing = True
            if await self._remove(predecessor.sid):
                try:
                    async with asyncio.timeout(GONE_WITHIN):
                        await self._left.wait()
                except TimeoutError:
                    continue
        if self._predecessor is not None:
            raise Withdrawn("the predecessor does not answer, and can't be removed")
        self._look_for_others()
        log.warning("lastcall.call: a call goes on without a word of its predecessor")

    async def _until_it_hears(self) -> None:
        """Wait for the subscription to each audio track of a caller that is not muted; for a moment only."""

        def is_deaf() -> bool:
            return any(
                publication.track is None and not publication.muted
                for each in self._room.remote_participants.values()
                if each.kind not in DEPENDENT_KINDS
                for publication in each.track_publications.values()
                if publication.kind == rtc.TrackKind.KIND_AUDIO
            )

        due = now() + HEARS_WITHIN
        while is_deaf() and now() < due:  # noqa: ASYNC110  # several events may change it
            await asyncio.sleep(0.01)

    # -- what happens in the room ---------------------------------------------------------------------

    def _on_stream(self, topic: str, reader: Any, sender: str) -> None:
        is_meant = sender == self.succession.predecessor
        epoch = (reader.info.attributes or {}).get("epoch")
        if is_meant and epoch == str(self.succession.epoch) and not self._parts[topic].done():
            self._spawn(self._read(topic, reader))

    async def _read(self, topic: str, reader: Any) -> None:
        try:
            line = b"".join([bytes(part) async for part in reader])
        except Exception as error:  # of livekit's client
            log.warning("lastcall.call: a capsule can't be read", extra={"error": type(error).__name__})
            return
        if not self._parts[topic].done() and (not reader.info.size or len(line) == reader.info.size):
            self._parts[topic].set_result(line)

    def _on_disconnected(self, participant: Any) -> None:
        if participant.identity == self.succession.predecessor:
            self._left.set()

    def _on_connected(self, participant: Any) -> None:
        """Remove a predecessor that comes back although it was removed, because it was not told."""
        if participant.identity != self.succession.predecessor:
            return
        self._left.clear()
        self._end_if_superseded()
        if self._is_removing or self.may_speak:
            self._spawn(self._remove_again(participant.sid))

    def _on_reconnected(self) -> None:
        self._end_if_superseded()
        if self.may_speak:  # a full reconnect has brought back the attributes of the begin
            self._spawn(self._say_that_it_speaks())

    def _end_if_superseded(self) -> None:
        """Leave if this agent has lost the right to speak: it may have been removed, and not know."""
        found = self.succession
        agents = [each.attributes for each in self._room.remote_participants.values() if each.kind == AGENT]
        if self.may_speak and succession.is_superseded(found.call, found.epoch, agents):
            self._give_up("the call has gone on in another job")

    async def _remove_again(self, sid: str) -> None:
        if not await self._remove(sid):
            log.warning("lastcall.call: a predecessor that came back can't be removed")

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)
