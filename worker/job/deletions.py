"""A room that a successor serves is not deleted by the agent that leaves it.

Agents delete their room at the end of a call: `ctx.delete_room()` in a shutdown callback,
`delete_room_on_close` of AgentSession, or a client of `livekit.api`. All of them call one public method. A
job process has one call, so that the method is replaced for the process.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from livekit import api
from livekit.api.room_service import RoomService

log = logging.getLogger("lastcall")

_forbidden: set[str] = set()


def forbid(room: str) -> None:
    """Have no code of this process delete the room."""
    _forbidden.add(room)
    _guard()


def permit(room: str) -> None:
    """Let the room be deleted again."""
    _forbidden.discard(room)


def may_delete(room: str) -> bool:
    """Tell whether code of this process may delete the room."""
    return room not in _forbidden


def _guard() -> None:
    delete: Any = RoomService.delete_room
    if hasattr(delete, "is_guarded"):
        return

    @functools.wraps(delete)
    async def guarded(self: Any, request: Any) -> Any:
        if not may_delete(request.room):
            log.info("lastcall.call: the room is not deleted: the call goes on in another job")
            return api.DeleteRoomResponse()
        return await delete(self, request)

    guarded.is_guarded = True  # type: ignore[attr-defined]  # a mark on a function
    RoomService.delete_room = guarded
