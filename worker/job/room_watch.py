"""The entrypoint of every job, around that of the agent: it looks at the room, and begins a handover.

The worker is told when the job joins, reconnects and leaves.

The LiveKit server terminates jobs that go on (`worker.presence`), and only the job itself knows whether it is
in its room. The look begins before the entrypoint of the agent, and uses the public side of `rtc.Room`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

from lastcall.worker.base import succession
from lastcall.worker.base.calls_over import What
from lastcall.worker.job import call

log = logging.getLogger("lastcall")

# livekit.DisconnectReason of a room that the job itself has left.
CLIENT_INITIATED = 1
# Seconds for the code of a successor that leaves again to end, before it is cancelled. Ours: livekit-agents
# waits for it for 15 s, and a room that was left may never answer what such code waits for.
LEAVES_WITHIN = 2.0

Tell = Callable[[str, What, int, str], None]

# By the JobProcess of livekit-agents, of which each job has one. The entrypoint can't have it: it is pickled.
_tells: weakref.WeakKeyDictionary[Any, Tell] = weakref.WeakKeyDictionary()


def begin(process: Any, tell: Tell) -> None:
    """Have the job of a process tell what becomes of its room. `tell` gets the job's id."""
    _tells[process] = tell


class WatchedEntrypoint:
    """Look at the room, and run the entrypoint of the agent. livekit-agents pickles it."""

    def __init__(self, user: Callable[[Any], Awaitable[None]]) -> None:
        self.user = user

    async def __call__(self, context: Any) -> None:
        tell = _tells.get(context.proc)
        if tell is not None:
            watch(context.room, functools.partial(tell, context.job.id))
        # An older livekit-protocol has no attributes of a job.
        found = succession.taken_from(getattr(context.job, "attributes", {}))
        if found is None or tell is None:
            await self.user(context)
        else:
            await self._succeed(context, found)

    async def _succeed(self, context: Any, found: succession.Succession) -> None:
        """Run the entrypoint of an agent that goes on with a call. A successor that has to leave does so."""
        arrived = call.arrive(context, found)
        shutdown = context.shutdown
        is_shut_down = False
        limit = asyncio.timeout(None)

        @functools.wraps(shutdown)
        def ended(*arguments: Any, **options: Any) -> None:
            nonlocal is_shut_down
            is_shut_down = True
            arrived.end_arrival("the agent shuts its job down")
            shutdown(*arguments, **options)
            if arrived.is_withdrawn and limit.when() is None:  # agents may shut down again and again
                with contextlib.suppress(RuntimeError):  # the entrypoint has returned
                    limit.reschedule(asyncio.get_running_loop().time() + LEAVES_WITHIN)

        context.shutdown = ended
        try:
            async with limit:
                await self.user(context)
        except Exception as error:
            # Withdrawn, a cancel by the limit, or whatever an agent raises that finds itself out of its room.
            why = f"the entrypoint raised {type(error).__name__}"
            if not arrived.is_withdrawn:
                arrived.end_arrival(why)
                if not is_shut_down and await arrived.pass_on(why):
                    log.exception("lastcall.call: the entrypoint raised, and the call goes on in another job")
                    return
                raise
            log.info("lastcall.call: the entrypoint has ended", extra={"error": type(error).__name__})


def watch(room: Any, tell: Callable[[What, int, str], None]) -> None:
    """Tell of each join, reconnection and end of a room."""
    is_in = False

    def agent() -> str:
        return f"{room.local_participant.sid} {room.local_participant.identity}"

    def left(reason: int) -> None:
        nonlocal is_in
        is_in = False
        tell("left", reason, "")

    connect, disconnect = room.connect, room.disconnect

    @functools.wraps(connect)
    async def connected(*arguments: Any, **options: Any) -> Any:
        nonlocal is_in
        result = await connect(*arguments, **options)
        is_in = True
        tell("joined", 0, agent())
        return result

    @functools.wraps(disconnect)
    async def disconnected(*arguments: Any, **options: Any) -> Any:
        result = await disconnect(*arguments, **options)
        # livekit 1.1.21 emits no `disconnected` where the state of the connection has changed and the room's
        # last event has come before it (rtc/room.py, line 713). Without this the job seems to stay, and is
        # asked to shut down in the middle of its work after the call.
        if is_in:
            left(CLIENT_INITIATED)
        return result

    room.connect = connected  # the room has no event for this
    room.disconnect = disconnected
    room.on("reconnecting", lambda: tell("reconnecting", 0, ""))
    room.on("reconnected", lambda: tell("reconnected", 0, agent()))
    room.on("disconnected", lambda reason=0, *_: left(int(reason or 0)))
