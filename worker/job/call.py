"""`lastcall.call`: a call hears that its time is limited, may ask for more, and may go on in another job.

The first use connects the job to its worker; `worker.call_channels` draws the way. Everything here happens on
the event loop of the job, in callbacks of its reader, so there is no task and no thread that waits. `leaving`
and `arriving` have the two sides of a handover.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import itertools
import logging
import math
import socket
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, assert_never

from lastcall.worker.base.clock import now
from lastcall.worker.base.errors import WireError
from lastcall.worker.base.peers import is_of_this_user
from lastcall.worker.base.succession import Succession
from lastcall.worker.base.wire import (
    FOR_CALL,
    AskExtension,
    AskHandover,
    AskRemoval,
    AskToSpeak,
    BeginHandover,
    CallHears,
    CallJoined,
    CallKeeps,
    CallSays,
    CallStep,
    CancelHandover,
    Counts,
    HandoverOver,
    HandoverResult,
    LeaveRoom,
    Limit,
    MaySpeak,
    Removed,
    StopCause,
    TakeBack,
    encode,
)
from lastcall.worker.job.capsule import Busy, Capsule

if TYPE_CHECKING:
    from lastcall.worker.job.arriving import Arriving, Resumed
    from lastcall.worker.job.leaving import Leaving

log = logging.getLogger("lastcall")

# Seconds by which a deadline has to have moved before a callback is called again. A worker that is signalled
# with its supervisor reckons the deadline by itself for some milliseconds. Ours: less than a word takes.
MOVED_BY = 0.5
# Seconds for the answer of the worker. Ours: it takes a millisecond, and a worker that is stuck has none.
ANSWER_WITHIN = 1.0
# Seconds for functions of `on_stopping` that are cancelled at the end of the job. Ours: the Inworld close
# follows within the same 4 s (`teardown.OWN_CLOSE_WITHIN`), and needs two round trips.
CANCEL_WITHIN = 1.0
# Seconds until the next try to connect to a worker that has not let in hundreds of calls before this one.
CONNECT_AGAIN_AFTER = 0.25
# Bytes of a message. Ours: a `Limit` has about a hundred.
MAX_MESSAGE_BYTES = 8192
# Seconds between two reports of the size of a capsule. Ours: an agent keeps one at each turn of its call.
TELL_AGAIN_AFTER = 1.0
# Seconds for the worker to have removed a predecessor. Ours: as `room_service.ANSWERS_WITHIN`, twice.
REMOVED_WITHIN = 6.0
# Seconds for a handover that the agent asks for. Ours: more than the worker takes with `[handover] wait` and
# `patience` of a minute each, and a worker that is stuck has been killed before.
HANDED_OVER_WITHIN = 300.0
# Characters of a reason that are told.
MAX_REASON = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A call is told why its time is limited, and until when. Since 0.2.0.

    `reason`: "reload" or "recycle" when a new worker has taken the place of this one, and "handover" when
    that was done to hand its calls over at once. A worker that was stuck is a "stall". Every other end of the
    worker or of the supervisor is a "stop".
    `deadline`: the time by which the call should have ended by itself, as `time.monotonic()` tells it. A call
    that goes on is then asked to shut down, and counts as cut.
    `is_first`: False when the callback has been called before, and the deadline or the reason has changed.
    """

    reason: StopCause
    deadline: float
    is_first: bool = True

    @property
    def seconds_left(self) -> float:
        """Seconds from now to the deadline; 0 when it has passed."""
        return max(0.0, self.deadline - now())


Listener = Callable[[Notice], Awaitable[object] | object]
F = TypeVar("F", bound=Listener)
G = TypeVar("G", bound=Callable[[], Awaitable[object] | object])


class StoppingEvent:
    """The event that the time of a call is limited. `await call.stopping` waits for it. Since 0.2.0."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._notice: Notice | None = None

    def is_set(self) -> bool:
        """Tell whether the call has been told."""
        return self._notice is not None

    @property
    def notice(self) -> Notice | None:
        """The newest notice, with the deadline that holds now; None while the time is not limited."""
        return self._notice

    async def wait(self) -> Notice:
        """Return the newest notice, once there is one."""
        await self._event.wait()
        assert self._notice is not None
        return self._notice

    def __await__(self) -> Generator[Any, None, Notice]:
        """Wait as `wait` does."""
        return self.wait().__await__()

    def set(self, notice: Notice) -> None:
        """Note the newest notice. For lastcall, which is told by the worker."""
        self._notice = notice
        self._event.set()


class _Listening:
    """One function of `on_stopping`, and the notice that it was last called with."""

    __slots__ = ("context", "function", "told")

    def __init__(self, function: Listener) -> None:
        self.function = function
        self.context = contextvars.copy_context()
        self.told: Notice | None = None

    def is_news(self, notice: Notice) -> bool:
        told = self.told
        return (
            told is None or told.reason != notice.reason or abs(told.deadline - notice.deadline) >= MOVED_BY
        )


class Call:
    """The call of one job, as `lastcall.call(ctx)` returns it. Since 0.2.0.

    Everything is for the job's event loop. Times are in seconds, and deadlines are readings of
    `time.monotonic()`.

    `stopping` is the event that the time of the call is limited:

        notice = await call.stopping
        if call.stopping.is_set(): ...
    """

    def __init__(
        self, ctx: Any, address: str | None, found: Succession | None = None
    ) -> None:  # Any: livekit-agents' JobContext, which is not type-checked here
        self.stopping = StoppingEvent()
        # Until the job ends. Without lastcall the end is not told, and nothing here needs it.
        self._ctx: Any = None if address is None else ctx
        self._job: str = ctx.job.id
        # Whether code of the agent has asked for this call, and whether it has done so after its connect.
        self.is_asked_for = found is None
        self._is_late = found is None and address is not None and _is_connected(ctx)
        self._address = address or ""
        self._loop = asyncio.get_running_loop()
        self._sock: socket.socket | None = None
        self._has_lost_worker = False
        self._connect_again: asyncio.TimerHandle | None = None
        self._listening: list[_Listening] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[CallHears | None]] = {}
        self._capsule = Capsule()
        self._busy = Busy()
        self._succession = found
        self._leaving: Leaving | None = None
        self._arriving: Arriving | None = None
        self._told_keeps: tuple[float, str] = (0.0, "")
        if address:
            self._connect()
        elif address is not None:
            log.warning("lastcall.call: the worker has no socket for calls, and this job is told of no stop")
        else:
            log.info("lastcall.call: this job does not run under lastcall, and is told of no stop")

    @property
    def is_inert(self) -> bool:
        """Whether the call will be told nothing: it does not run under lastcall, or the job has ended."""
        return self._sock is None and self._connect_again is None

    def on_stopping(self, fn: F) -> F:
        """Have `fn(notice)` called when the time of the call is limited, and return `fn`.

        `fn` is a function or an async function. It is called within 100 ms of the moment from which the
        worker takes no new job. It is called again when the deadline has moved by half a second or more, or
        the reason has changed; `notice.is_first` tells the two apart. Where the time is limited already, `fn`
        is called in the next turn of the event loop. An exception in `fn` is logged. An async `fn` that still
        runs when the job has ended, after the shutdown callbacks, is cancelled, and has a second to end. May
        be used as a decorator.
        """
        listening = _Listening(fn)
        self._listening.append(listening)
        if self.stopping.is_set():
            self._loop.call_soon(self._tell, listening)
        return fn

    async def extend(self, seconds: float) -> float | None:
        """Ask for `seconds` beyond the deadline; return the deadline that holds now, as a `time.monotonic()`.

        While the time is not limited the answer is None. A call can have what `[stop] close` has beyond the
        time that a job needs which is asked to shut down, and no more: the end of grace does not move. Where
        nothing can be had, the answer is the deadline as it was. Raises ValueError for a number that is
        negative or not finite.
        """
        if not math.isfinite(seconds) or seconds < 0:
            raise ValueError(f"call.extend({seconds!r}): expected a number of seconds, 0 or more")
        if self.stopping.is_set() and self._sock is not None:
            id = next(self._ids)
            await self._ask(AskExtension(id=id, seconds=float(seconds)), ANSWER_WITHIN)
        notice = self.stopping.notice
        return None if notice is None else notice.deadline

    # -- a call that goes on in another job -----------------------------------------------------------

    @property
    def resumed(self) -> Resumed | None:
        """The state that the predecessor of this call has left; None for a call that begins here."""
        return None if self._arriving is None else self._arriving.resumed

    def keep(self, state: object) -> None:
        """Keep what a successor needs to go on with this call: any JSON value, or a function that returns it.

        The value has at most 262,144 bytes as UTF-8. It is taken as it is now, and stays in the process of
        this job until a successor is there. A function, also an async one, is called when the value is
        needed, and has a second. The last call of `keep` counts.

        Raises `TypeError` for a value that JSON does not have, or with lists and objects more than 500 deep
        in one another. Raises `ValueError` for a value that is too large. The errors show nothing of it.
        """
        self._capsule.keep(state)
        self._tell_keeps()

    def on_takeover(self, fn: G) -> G:
        """Have `fn()` called at the moment from which the successor speaks, and return `fn`.

        The agent has to be silent when `fn` returns, and has to stay so. `fn` is a function or an async
        function, has a second, and returns the last turns of the call, any JSON value or None: `take_over`
        of the successor returns them. The job ends when the successor has said that it speaks. May be used
        as a decorator; the last function counts.
        """
        leaving = self._side()
        leaving.on_takeover = fn
        self._tell_keeps()
        return fn

    def on_take_back(self, fn: G) -> G:
        """Have `fn()` called when the agent has the call again after `on_takeover`, and return `fn`.

        That is so when the successor died before it spoke. The agent may speak from then on. A call without
        such a function is not handed over. May be used as a decorator; the last function counts.
        """
        self._side().on_take_back = fn
        self._tell_keeps()
        return fn

    async def take_over(self) -> Any:  # any JSON value
        """Return when this agent may speak, with the last turns of its predecessor.

        In a call that begins here the answer is None, at once. In a successor the predecessor has become
        silent before. Call it after `ctx.connect()`, when everything is restored and the agent could speak
        in the next moment.

        Raises `lastcall.Withdrawn` if the call stays with the predecessor. The job is then shut down.
        """
        if self._arriving is None:
            return None
        turns = await self._arriving.take_over()
        self._tell_keeps()  # from now on the call can be handed over from here
        return turns

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Have the call stay in this job inside of the block: `async with call.busy():`.

        For a tool that runs, or a transfer of the caller. A handover waits for the end of the block, for
        `[handover] wait` seconds, and is then refused. Blocks may lie in one another.
        """
        async with self._busy.during():
            yield

    async def hand_over(self, reason: str = "") -> HandoverResult:
        """Have the call go on in another job, for a reason of the agent's own; return how that ended.

        After "done" the successor speaks, and this job shuts down. The answer is "refused" if the call can't
        be handed over, or another handover of the call is under way. It is "failed" if nobody took the call,
        the successor died, or the worker has not answered within 300 s. This agent then goes on, and the log
        says why.
        """
        if self._sock is None:
            log.warning("lastcall.call: no handover, because there is no worker that could do it")
            return "refused"
        id = next(self._ids)
        answer = await self._ask(AskHandover(id=id, reason=reason[:MAX_REASON]), HANDED_OVER_WITHIN)
        if not isinstance(answer, HandoverOver):
            return "failed"
        if answer.result != "done":
            log.warning(
                "lastcall.call: the call is not handed over",
                extra={"result": answer.result, "reason": answer.reason},
            )
        return answer.result

    def be_successor(self, found: Succession) -> None:
        """Be the successor that a dispatch has asked for, before the entrypoint runs. For lastcall."""
        from lastcall.worker.job.arriving import Arriving, Resumed

        assert self._ctx is not None
        job = self._ctx.job
        resumed = Resumed(
            epoch=found.epoch, reason=found.reason, metadata=job.metadata, attributes=job.attributes
        )
        self._arriving = Arriving(
            found,
            resumed,
            job=self._job,
            remove=self._remove_predecessor,
            withdraw=self._withdraw,
            is_stopping=lambda: self.stopping.is_set() or self._has_lost_worker,
            may_speak=self._worker_lives,
            is_asked_for=lambda: self.is_asked_for,
        )
        self._arriving.attach(self._ctx.room, job.room.name)

    def end_arrival(self, why: str) -> None:
        """Have a successor leave whose own code ends before it has the call. For lastcall."""
        if self._arriving is not None:
            self._arriving.end(why)

    async def pass_on(self, why: str) -> bool:
        """Have the call of a successor whose code has failed go on in another job; tell whether it does.

        The predecessor has gone, and the state is here. For lastcall.
        """
        arriving = self._arriving
        can = arriving is not None and arriving.serves_a_caller and not self._side().lacks
        return can and await self.hand_over(why) == "done"

    def _withdraw(self) -> None:
        if self._succession is not None:
            self._say(CallStep(epoch=self._succession.epoch, step="withdrawn"))
        if self._ctx is not None:
            self._ctx.shutdown(reason="the handover is withdrawn")

    async def _remove_predecessor(self, sid: str) -> bool:
        id = next(self._ids)
        answer = await self._ask(AskRemoval(id=id, sid=sid), REMOVED_WITHIN)
        return isinstance(answer, Removed) and answer.is_gone

    async def _worker_lives(self, within: float) -> bool:
        id = next(self._ids)
        return isinstance(await self._ask(AskToSpeak(id=id), within), MaySpeak)

    def _side(self) -> Leaving:
        """Return the leaving side of this call, made when the agent first says that it can leave."""
        if self._leaving is None:
            from lastcall.worker.job.leaving import Leaving

            found = self._succession
            ctx = self._ctx
            self._leaving = Leaving(
                room=None if ctx is None else ctx.room,
                capsule=self._capsule,
                busy=self._busy,
                say=self._say,
                leave=self._leave,
                call=self._job if found is None else found.call,
                epoch=0 if found is None else found.epoch,
                has_call=self._has_call,
            )
        return self._leaving

    def _has_call(self) -> bool:
        """Tell whether this job has the call: a successor has it from the takeover on."""
        return self._arriving is None or self._arriving.may_speak

    @property
    def is_withdrawn(self) -> bool:
        """Whether this job is a successor that has to leave again. For lastcall."""
        return self._arriving is not None and bool(self._arriving.withdrawn)

    def _leave(self) -> None:
        if self._ctx is not None:
            self._ctx.shutdown(reason="the call goes on in another job")

    def _tell_keeps(self) -> None:
        about = self._capsule.about
        if about is None:
            return
        lacks = "no function of on_takeover" if self._leaving is None else self._leaving.lacks
        if self._is_late:  # a successor of the same code would be withdrawn
            lacks = "lastcall.call(ctx) was called after ctx.connect(), call it before"
        told_at, told_lacks = self._told_keeps
        if now() - told_at >= TELL_AGAIN_AFTER or lacks != told_lacks:
            self._told_keeps = (now(), lacks)
            self._say(CallKeeps(size=about[0], kept_at=about[1], lacks=lacks))

    async def _ask(
        self, question: AskExtension | AskHandover | AskRemoval | AskToSpeak, within: float
    ) -> CallHears | None:
        """Return the answer of the worker; None if there is none within so many seconds, or no worker."""
        if self._sock is None:
            return None
        answer: asyncio.Future[CallHears | None] = self._loop.create_future()
        self._answers[question.id] = answer
        try:
            self._say(question)
            async with asyncio.timeout(within):
                return await answer
        except TimeoutError:
            log.warning("lastcall.call: the worker has not answered", extra={"seconds": within})
            return None
        finally:
            del self._answers[question.id]

    # -- the way to the worker ------------------------------------------------------------------------

    def _connect(self) -> None:
        self._connect_again = None
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            sock.connect(self._address)
            if not is_of_this_user(sock):
                raise PermissionError("the address belongs to another user")
        except BlockingIOError:
            sock.close()
            self._connect_again = self._loop.call_later(CONNECT_AGAIN_AFTER, self._connect)
            return
        except OSError as error:
            sock.close()
            log.warning("lastcall.call: the worker can't be reached", extra={"error": repr(error)})
            return
        self._sock = sock
        self._loop.add_reader(sock.fileno(), self._read)
        self._say(CallJoined(job=self._job))

    def _say(self, message: CallSays) -> None:
        if self._sock is None:
            return
        try:
            self._sock.send(encode(message))
        except BlockingIOError:
            return  # only questions can fill the socket, and one without an answer ends by itself
        except OSError:
            self._lose_worker()

    def _read(self) -> None:
        assert self._sock is not None
        try:
            line = self._sock.recv(MAX_MESSAGE_BYTES)
            message = FOR_CALL.decode(line) if line else None
        except BlockingIOError:
            return
        except (OSError, WireError) as error:
            log.warning("lastcall.call: the worker is not heard any more", extra={"error": repr(error)})
            line, message = b"", None
        if not line:
            self._lose_worker()
        elif message is not None:
            self._hear(message)

    def _hear(self, message: CallHears) -> None:
        match message:
            case Limit():
                self.stopping.set(Notice(reason=message.cause, deadline=message.due_at))
                self._answer(message.answers, message)
                if self._arriving is not None:
                    self._arriving.stop()
                for listening in list(self._listening):
                    self._tell(listening)
            case HandoverOver(id=id) | Removed(id=id) | MaySpeak(id=id):
                self._answer(id, message)
            case BeginHandover():
                self._side().begin(message)
            case CancelHandover(epoch=epoch):
                self._side().cancel(epoch)
            case TakeBack(epoch=epoch):
                self._side().take_back(epoch)
            case LeaveRoom(epoch=epoch):
                self._side().leave(epoch)
            case _:
                assert_never(message)

    def _answer(self, id: int, message: CallHears | None) -> None:
        answer = self._answers.get(id)
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _disconnect(self) -> None:
        if self._connect_again is not None:
            self._connect_again.cancel()
            self._connect_again = None
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None
        for id in list(self._answers):
            self._answer(id, None)

    def _lose_worker(self) -> None:
        """Do what can be done yet: the worker dies, and this job with it in some milliseconds."""
        self._has_lost_worker = True
        self._disconnect()
        self.end_arrival("the worker of the successor has died")
        if self._leaving is not None:
            self._leaving.lose_worker()

    # -- the functions of the agent -------------------------------------------------------------------

    def _tell(self, listening: _Listening) -> None:
        """Call a function in the context in which it was given, where livekit-agents finds the job."""
        newest = self.stopping.notice
        assert newest is not None
        if not listening.is_news(newest):
            return
        is_first = listening.told is None
        listening.told = newest
        notice = Notice(reason=newest.reason, deadline=newest.deadline, is_first=is_first)
        try:
            result = listening.context.run(listening.function, notice)
        except (Exception, asyncio.CancelledError):
            log.exception("lastcall.call: a function of on_stopping raised")
            return
        if inspect.isawaitable(result):
            task = self._loop.create_task(_awaited(result), context=listening.context)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """End with the job: nothing is told any more. For lastcall."""
        for side in (self._leaving, self._arriving):
            if side is not None:
                await side.aclose()
        self._disconnect()
        self._ctx = None
        self._listening.clear()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=CANCEL_WITHIN)
            if left:
                fields = {"functions": len(left), "seconds": CANCEL_WITHIN}
                log.warning("lastcall.call: functions of on_stopping do not end", extra=fields)


async def _awaited(result: Awaitable[object]) -> None:
    try:
        await result
    except Exception:
        log.exception("lastcall.call: a function of on_stopping raised")


# Both by the JobProcess of livekit-agents, of which each job has one; global, because an agent can reach them
# by an import only.
_addresses: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_calls: weakref.WeakKeyDictionary[Any, Call] = weakref.WeakKeyDictionary()


def begin(process: Any, address: str) -> None:
    """Give a job process the address of its worker, before its job runs; "" where the worker has none."""
    _addresses[process] = address


async def end(process: Any) -> Counts:
    """Close the call of a job process, if its code has asked for one."""
    made = _calls.get(process)
    if made is not None:
        await made.aclose()
    return {}


def call(ctx: Any) -> Call:  # Any: livekit-agents' JobContext, which is not type-checked here
    """Return the call of the job of `ctx`; the same object each time.

    `ctx` is the JobContext that the entrypoint got. Through its call an agent hears that the worker stops,
    while there is time to end the conversation. Where the job does not run under lastcall the call is inert
    (`call.is_inert`): nothing is ever told, and one line of the log says so. An agent whose calls go on in
    another job calls it before `ctx.connect()`.

    Raises RuntimeError outside the event loop of the job. Since 0.2.0.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError("lastcall.call(ctx) has to be called on the event loop of the job") from None
    made = _calls.get(ctx.proc)
    if made is None:
        made = _calls[ctx.proc] = Call(ctx, _addresses.get(ctx.proc))
    made.is_asked_for = True
    return made


def _is_connected(ctx: Any) -> bool:
    room = getattr(ctx, "room", None)
    return room is not None and bool(room.isconnected())


def arrive(ctx: Any, found: Succession) -> Call:
    """Have the job of `ctx` be a successor, before its entrypoint runs. For lastcall."""
    made = _calls[ctx.proc] = Call(ctx, _addresses.get(ctx.proc), found)
    made.be_successor(found)
    return made
