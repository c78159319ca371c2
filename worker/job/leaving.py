"""The leaving agent of a handover: it gives its capsule away, is silent when asked to be, and leaves.

    worker                     leaving agent                        arriving agent
    BeginHandover    ───────►  waits until it is not busy, reads
                     ◄───────  the capsule: prepared, impossible
                               ◄──── RPC hello(secret) ───────────  has joined the room
                     ◄───────  seen
                               ───── capsule, a byte stream ─────►
                               ◄──── RPC takeover(secret) ────────  is ready to speak
                               is silent
                     ◄───────  silent
                               ───── the last turns, and the
                               capsule if it was kept anew ──────►  may speak, sets `speaks`
                     ◄───────  speaks; the job ends

An RPC method can be called by every participant of the room. So it answers one identity alone, which the
worker has named before the dispatch, of the kind AGENT, and only with the secret of the dispatch. The server
tells of a participant that publishes nothing up to 3 s late (subscriberUpdateInterval, pkg/rtc/room.go). A
successor that is not known yet gets the capsule for its secret, and has to wait with the takeover.

From the answer to `takeover` on the agent is silent, and one step decides which of the two speaks then.
Either the agent sees the successor say so, and leaves. Or it refuses this successor for good
(`CancelHandover`), and then its worker decides: the successor is removed, and the agent speaks again
(`TakeBack`), or the agent leaves (`LeaveRoom`). A successor that was removed may come back without knowing (a
full reconnect), and is removed again.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import inspect
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from livekit import rtc

from lastcall.worker.base import succession
from lastcall.worker.base.clock import now
from lastcall.worker.base.wire import BeginHandover, CallStep, HandoverStep
from lastcall.worker.job import deletions
from lastcall.worker.job.capsule import Busy, Capsule, NotJson, TooLarge, encode

log = logging.getLogger("lastcall")

HELLO, TAKEOVER = "lastcall.hello", "lastcall.takeover"
CAPSULE, TURNS, NEWER = "lastcall.capsule", "lastcall.turns", "lastcall.newer"
# Seconds for the function of `on_takeover`. Ours: an interruption of AgentSession takes 22 ms at most.
SILENT_WITHIN = 1.0
# Seconds in which a participant that has left is back, if only this client has reconnected. Ours: the server
# tells all participants in one message.
BACK_WITHIN = 0.2
# livekit.DisconnectReason of a participant that is not waited for: CLIENT_INITIATED and PARTICIPANT_REMOVED.
# Where this client reconnects, the others leave without a reason. A successor that the server asks for a
# full reconnect leaves with the first, and is back after 0.26 s (measured with 1.13.5). Its try fails.
LEFT_FOR_GOOD = frozenset({1, 4})
# Seconds for a job that shuts down to leave its room. Ours: a session closes within a second.
LEAVES_WITHIN = 2.0
# Seconds of silence after which the agent decides without its worker. Ours: more than the worker takes
# (`handovers.REMOVED_WITHIN`), so that this is for a fault of the worker alone.
SILENT_AT_MOST = 45.0
# Bytes of last turns and state in the answer of an RPC, before base64. Livekit's clients refuse 15361.
MAX_INLINE = 10_000
# As `ParticipantKind` of livekit's protocol has them.
AGENT, DEPENDENT_KINDS = 4, frozenset({1, 2, 4})

Phase = Literal["none", "getting ready", "ready", "seen", "silencing", "silent", "withdrawn", "left"]
Say = Callable[[CallStep], None]
Function = Callable[[], Awaitable[object] | object]


class Refused(Exception):
    """Raised by a step that has to be refused; the text goes to the successor."""


class Leaving:
    """The leaving side of one call. `room` is that of the job, and `leave` ends the job.

    `epoch`: that of this agent. After a takeover that was taken back it is the epoch of the successor.
    """

    def __init__(
        self,
        *,
        room: Any,
        capsule: Capsule,
        busy: Busy,
        say: Say,
        leave: Callable[[], None],
        call: str,
        epoch: int,
        has_call: Callable[[], bool] = lambda: True,
    ) -> None:
        self.on_takeover: Function | None = None
        self.on_take_back: Function | None = None
        self.phase: Phase = "none"
        self._room = room
        self._capsule = capsule
        self._busy = busy
        self._say_step = say
        self._leave = leave
        self._call = call
        self._epoch = epoch
        self._has_call = has_call
        self._order: BeginHandover | None = None
        self._line = b""
        self._version = 0
        self._asked_at: float | None = None
        self._speaking: set[str] = set()
        self._is_listening = False
        self._has_withdrawn = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def lacks(self) -> str:
        """Why the call can't be handed over, as far as its agent knows; empty when it can."""
        if not self._has_call():
            return "the agent has not the call yet"
        if not self._capsule.is_kept:
            return "no call.keep"
        if self.on_takeover is None:
            return "no function of on_takeover"
        if self.on_take_back is None:
            return "no function of on_take_back"
        return ""

    # -- what the worker says -------------------------------------------------------------------------

    def begin(self, order: BeginHandover) -> None:
        """Get ready for a successor."""
        if self.phase != "none":
            self._say(order.epoch, "impossible", detail="another handover is under way")
        elif self.lacks:
            self._say(order.epoch, "impossible", detail=self.lacks)
        else:
            self._order, self.phase, self._asked_at = order, "getting ready", None
            self._spawn(self._get_ready(order))

    def cancel(self, epoch: int) -> None:
        """Refuse the successor of this epoch from now on, unless it was seen to speak already.

        A silent agent stays silent until `take_back` or `leave`.
        """
        if self._is_at(epoch, "getting ready", "ready", "seen"):
            self._end(epoch)
        elif self._is_at(epoch, "silent"):
            self.phase = "withdrawn"
        elif not self._is_at(epoch, "withdrawn"):
            return
        if self.phase == "withdrawn":
            self._say(epoch, "silent")
        self._say(epoch, "cancelled")

    def take_back(self, epoch: int) -> None:
        """Speak again: the successor is out of the room."""
        if self._is_at(epoch, "silent", "withdrawn"):
            self.phase, self._epoch, self._has_withdrawn = "withdrawn", epoch, True
            self._spawn(self._speak_again(epoch))

    def leave(self, epoch: int) -> None:
        """End the job: the successor speaks."""
        if self._is_at(epoch, "silent", "withdrawn"):
            self._go(epoch)
        elif epoch > self._epoch:
            self._spawn(self._be_superseded())

    def lose_worker(self) -> None:
        """Leave the room if a successor is there or comes: this job ends some milliseconds after its worker.

        The server shows an agent that has died for 20 s, and the successor would wait for an answer of it.
        """
        if self.phase in ("ready", "seen", "silencing", "silent", "withdrawn"):
            self._spawn(leave_now(self._room))

    async def aclose(self) -> None:
        """End with the job."""
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- the steps ------------------------------------------------------------------------------------

    async def _get_ready(self, order: BeginHandover) -> None:
        reason = ""
        try:
            async with asyncio.timeout(order.wait):
                await self._busy.until_idle()
        except TimeoutError:
            reason = f"busy for {order.wait:g} s"
        if not reason:
            try:
                self._version = self._capsule.version
                self._line = await self._capsule.read() or b"null"
            except (NotJson, TooLarge) as error:
                reason = f"call.keep: {error}"
            except Exception as error:  # of the agent's function; its text may hold what a caller said
                reason = f"the function of call.keep raised {type(error).__name__}"
        if not self._is_at(order.epoch, "getting ready"):
            return
        if not reason and not self._room.isconnected():
            reason = "the agent is not in its room"
        if reason:
            self._end(order.epoch)
            self._say(order.epoch, "impossible", detail=reason)
            return
        self._listen()
        self.phase = "ready"
        self._say(order.epoch, "prepared")

    def _listen(self) -> None:
        me = self._room.local_participant
        me.register_rpc_method(HELLO, self._on_hello)
        me.register_rpc_method(TAKEOVER, self._on_takeover)
        if not self._is_listening:
            self._is_listening = True
            self._room.on("participant_connected", self._on_connected)
            self._room.on("participant_disconnected", self._on_disconnected)
            self._room.on("participant_attributes_changed", self._on_attributes)
            self._room.on("active_speakers_changed", self._on_speakers)
            self._room.on("reconnected", self._on_reconnected)

    async def _on_hello(self, data: Any) -> str:
        order, told, _ = self._check(data)
        if self.phase not in ("ready", "seen"):
            raise self._no(f"not now: {self.phase}")
        if self.phase == "ready":
            self.phase = "seen"
            self._say(order.epoch, "seen", job=str(told.get("job", ""))[:200])
            self._spawn(self._send(CAPSULE, self._line))
        return json.dumps({"bytes": len(self._line)})

    async def _on_takeover(self, data: Any) -> str:
        """Be silent, and answer with the last turns; while it is no good moment, say that it is not.

        A state that the agent has kept since the capsule was sent is a part of the answer.
        """
        order, _, is_known = self._check(data)
        began = now()
        if self.phase != "seen":
            raise self._no(f"not now: {self.phase}")
        if not is_known:
            return json.dumps({"wait": True})
        if self._asked_at is None:
            self._asked_at = began
        waited = began - self._asked_at
        if self._busy.is_busy:
            if waited >= order.wait:
                self._end(order.epoch)
                self._say(order.epoch, "refused", detail=f"busy for {order.wait:g} s")
                raise self._no("busy")
            return json.dumps({"wait": True})
        if self._speaking and waited < order.wait:
            return json.dumps({"wait": True})
        self.phase = "silencing"
        deletions.forbid(self._room.name)
        try:
            async with asyncio.timeout(SILENT_WITHIN):
                parts = {TURNS: encode(await _result(self.on_takeover))}
                if self._capsule.version != self._version:
                    parts[NEWER] = await self._capsule.read() or b"null"
        except BaseException as error:  # the agent may be half silent: it is told to speak again
            self.phase = "withdrawn"
            self._spawn(self._speak_again(order.epoch, refused=f"on_takeover: {type(error).__name__}"))
            if not isinstance(error, Exception):
                raise
            log.error(
                "lastcall.call: a handover fails: the function of on_takeover raised, or was too slow",
                extra={"error": type(error).__name__},
            )
            raise self._no("the agent could not become silent") from None
        self.phase = "silent"
        self._say(order.epoch, "silent")
        self._spawn(self._end_silence(order.epoch))
        self._look_whether_it_speaks()
        answer: dict[str, Any] = {"took": now() - began}
        left = MAX_INLINE
        for topic, line in parts.items():
            answer[topic] = base64.b64encode(line).decode() if len(line) <= left else ""
            if len(line) <= left:
                left -= len(line)
            else:
                self._spawn(self._send(topic, line))
        return json.dumps(answer)

    def _check(self, data: Any) -> tuple[BeginHandover, dict[str, Any], bool]:
        """Return the order, the payload, and whether the caller is seen in the room already.

        Raises RpcError for every caller but the successor that is waited for.
        """
        order = self._order
        if order is None or data.caller_identity != order.identity:
            raise self._no("nobody is waited for here")
        try:
            told = json.loads(data.payload)
            is_right = hmac.compare_digest(str(told["secret"]), order.secret) and told["epoch"] == order.epoch
        except (ValueError, TypeError, KeyError):
            is_right = False
        caller = self._room.remote_participants.get(order.identity)
        if not is_right or (caller is not None and caller.kind != AGENT):
            raise self._no("nobody is waited for here")
        return order, told, caller is not None

    async def _send(self, topic: str, line: bytes) -> None:
        order = self._order
        if order is None:
            return
        try:
            writer = await self._room.local_participant.stream_bytes(
                "state",
                total_size=len(line),
                destination_identities=[order.identity],
                topic=topic,
                attributes={"epoch": str(order.epoch)},
            )
            await writer.write(line)
            await writer.aclose()
        except (
            Exception
        ) as error:  # of livekit's client; the successor misses it, and the worker the successor
            log.warning("lastcall.call: a capsule can't be sent", extra={"error": type(error).__name__})

    async def _end_silence(self, epoch: int) -> None:
        """Decide what the worker has not decided in time: speak again where no successor is in the room."""
        while True:
            await asyncio.sleep(SILENT_AT_MOST)
            order = self._order
            if order is None or not self._is_at(epoch, "silent", "withdrawn"):
                return
            log.error("lastcall.call: the worker has left a silent agent alone")
            if order.identity not in self._room.remote_participants:
                self.take_back(epoch)

    async def _speak_again(self, epoch: int, refused: str = "") -> None:
        if not self._room.isconnected():  # the job ends, as every job does whose room is gone
            self._end(epoch)
            return
        deletions.permit(self._room.name)
        try:
            async with asyncio.timeout(SILENT_WITHIN):
                await _result(self.on_take_back)
        except Exception as error:
            log.error(
                "lastcall.call: the function of on_take_back raised, or was too slow",
                extra={"error": type(error).__name__},
            )
        self._end(epoch)
        if refused:
            self._say(epoch, "refused", detail=refused)
        else:
            self._say(epoch, "back")
            await self._show_withdrawn()

    async def _show_withdrawn(self) -> None:
        """Show the epoch that has no right to speak to a successor which comes back without knowing."""
        shown = {succession.CALL: self._call, succession.WITHDRAWN: str(self._epoch)}
        with contextlib.suppress(Exception):  # of livekit's client; the worker removes that successor too
            await self._room.local_participant.set_attributes(shown)

    def _go(self, epoch: int) -> None:
        self._say(epoch, "speaks")
        self._end(epoch)
        self.phase = "left"
        self._leave()
        self._spawn(self._leave_room())

    async def _leave_room(self) -> None:
        """Leave the room where the entrypoint goes on: from 1.5.2 on livekit-agents lets it for 15 s."""
        await asyncio.sleep(LEAVES_WITHIN)
        await leave_now(self._room)

    def _end(self, epoch: int) -> None:
        """Wait for nobody any more. A later try has a later epoch, so that this one is refused for good."""
        self._order, self.phase, self._line = None, "none", b""
        with contextlib.suppress(Exception):  # of livekit's client, where the room has ended meanwhile
            self._room.local_participant.unregister_rpc_method(HELLO)
            self._room.local_participant.unregister_rpc_method(TAKEOVER)

    # -- what happens in the room ---------------------------------------------------------------------

    def _on_connected(self, participant: Any) -> None:
        """Have an agent of an epoch removed that has no right to speak: it may not know of its removal."""
        epoch = succession.epoch_of(participant.attributes, self._call)
        if participant.kind == AGENT and 0 <= epoch <= self._epoch:
            detail = f"{participant.sid} {participant.identity}"[:1000]
            self._say(epoch, "returned", detail=detail)

    def _on_disconnected(self, participant: Any) -> None:
        order = self._order
        if order is not None and participant.identity == order.identity:
            has_gone = participant.disconnect_reason in LEFT_FOR_GOOD
            self._spawn(self._tell_lost(order, 0.0 if has_gone else BACK_WITHIN))

    async def _tell_lost(self, order: BeginHandover, after: float) -> None:
        """Say that the successor has left, unless it is back: a reconnection shows everybody leave.

        They are back before this client is connected again (rust-sdks, `handle_restarting`). A silent agent
        does not wait for that: where the server is gone, its worker has to decide.
        """
        await asyncio.sleep(after)
        while self._is_away() and self._is_at(order.epoch, "ready", "seen"):  # noqa: ASYNC110  # as in `arriving`
            await asyncio.sleep(BACK_WITHIN)
        if self._order is order and order.identity not in self._room.remote_participants:
            self._say(order.epoch, "lost", detail="the successor left the room")

    def _on_attributes(self, _changed: Any, _participant: Any) -> None:
        self._look_whether_it_speaks()

    def _look_whether_it_speaks(self) -> None:
        order = self._order
        if order is None or self.phase != "silent":
            return
        successor = self._room.remote_participants.get(order.identity)
        if (
            successor is not None
            and successor.kind == AGENT
            and succession.speaks_at(successor.attributes, self._call) == order.epoch
        ):
            self._go(order.epoch)

    def _on_speakers(self, speakers: Any) -> None:
        self._speaking = {each.identity for each in speakers}

    def _on_reconnected(self) -> None:
        """Look whether a successor speaks already, as after a removal that the agent was not told of."""
        agents = [each for each in self._room.remote_participants.values() if each.kind == AGENT]
        if self.phase in ("silencing", "silent", "withdrawn"):  # the takeover decides
            self._look_whether_it_speaks()
        elif succession.is_superseded(self._call, self._epoch, [each.attributes for each in agents]):
            self._spawn(self._be_superseded())
            return
        for each in agents:
            self._on_connected(each)
        if self._has_withdrawn:  # a full reconnect has brought back the attributes of the begin
            self._spawn(self._show_withdrawn())

    async def _be_superseded(self) -> None:
        """Leave at once, without a word: another agent has the call."""
        if self.phase == "left":
            return
        self.phase = "left"
        log.warning("lastcall.call: the call has gone on in another job, and this one ends")
        deletions.forbid(self._room.name)
        try:
            async with asyncio.timeout(LEAVES_WITHIN):
                await asyncio.gather(_result(self.on_takeover), leave_now(self._room), return_exceptions=True)
        except TimeoutError:
            pass
        finally:
            self._leave()

    # -- small things ---------------------------------------------------------------------------------

    def _is_away(self) -> bool:
        return bool(self._room.connection_state == rtc.ConnectionState.CONN_RECONNECTING)

    def _is_at(self, epoch: int, *phases: Phase) -> bool:
        return self._order is not None and self._order.epoch == epoch and self.phase in phases

    def _say(self, epoch: int, step: HandoverStep, *, job: str = "", detail: str = "") -> None:
        self._say_step(CallStep(epoch=epoch, step=step, job=job, detail=detail))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    def _no(text: str) -> rtc.RpcError:
        return rtc.RpcError(rtc.RpcError.ErrorCode.APPLICATION_ERROR, text)


async def leave_now(room: Any) -> None:
    """Leave a room, as the fastest way to be silent there."""
    if room.isconnected():
        await room.disconnect()


async def _result(function: Function | None) -> Any:
    if function is None:
        return None
    result = function()
    return await result if inspect.isawaitable(result) else result
