"""The two sides of a handover in one process, each in a room of the local server. The test is the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from livekit import api

from lastcall.worker.base.succession import Succession
from lastcall.worker.base.wire import BeginHandover, CallStep
from lastcall.worker.job import deletions
from lastcall.worker.job.arriving import Arriving, Resumed
from lastcall.worker.job.capsule import Busy, Capsule
from lastcall.worker.job.leaving import Leaving
from lastcall.worker.local.livekit_server import Delays, DispatchServer
from lastcall.worker.local.room import Room

# Seconds; a condition ends each wait.
PATIENCE = 20.0
CALL, SECRET = "AJ_0", "0123456789abcdef"
FOUND = Succession(
    call=CALL, epoch=1, count=1, predecessor="bot", identity="bot~1", secret=SECRET, reason="reload"
)
ORDER = BeginHandover(call=CALL, epoch=1, identity="bot~1", secret=SECRET, wait=0.3)


def token(server: DispatchServer, identity: str, kind: str, **attributes: str) -> str:
    grants = api.VideoGrants(room_join=True, room="r", agent=kind == "agent")
    made = api.AccessToken(server.api_key, server.api_secret).with_identity(identity).with_kind(kind)
    text: str = made.with_attributes(attributes).with_grants(grants).to_jwt()
    return text


class Stage:
    """A caller, the leaving agent and its successor. `steps` are what the leaving agent told its worker."""

    def __init__(self, server: DispatchServer) -> None:
        self.server = server
        self.caller = server.rooms.visit("r", "caller")
        self.steps: list[CallStep] = []
        self.heard: list[str] = []
        self.left = asyncio.Event()
        self.withdrawn = asyncio.Event()
        self.old, self.new = Room(), Room()
        self.busy, self.capsule = Busy(), Capsule()
        self.turns: Any = ["bye"]
        self.leaving = Leaving(
            room=self.old,
            capsule=self.capsule,
            busy=self.busy,
            say=self.steps.append,
            leave=self.left.set,
            call=CALL,
            epoch=0,
        )
        self.leaving.on_takeover = self.be_silent
        self.leaving.on_take_back = lambda: self.heard.append("speaks again")
        self.resumed = Resumed(epoch=1, reason="reload", metadata="m", attributes={"k": "v"})
        self.arriving = Arriving(
            FOUND, self.resumed, job="AJ_1", remove=self.remove, withdraw=self.withdrawn.set
        )

    async def be_silent(self) -> Any:
        self.heard.append("silent")
        return self.turns

    async def remove(self, sid: str) -> bool:
        self.server.rooms.remove_session(sid)
        return True

    async def begin(self, state: object = "state", order: BeginHandover = ORDER) -> None:
        await self.old.connect(self.server.url, token(self.server, "bot", "agent"))
        self.capsule.keep(state)
        self.leaving.begin(order)
        await self.until(lambda: self.told("prepared", "impossible"))

    async def arrive(self, **shown: str) -> None:
        self.arriving.attach(self.new, "r")
        await self.new.connect(self.server.url, token(self.server, "bot~1", "agent", **(FOUND.shown | shown)))

    def told(self, *steps: str) -> bool:
        return any(each.step in steps for each in self.steps)

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not holds():
                await asyncio.sleep(0.002)


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    async with DispatchServer(delays=Delays(unpublished=0.0)) as server:
        made = Stage(server)
        try:
            yield made
        finally:
            deletions.permit("r")
            await made.leaving.aclose()
            await made.arriving.aclose()
            for room in (made.old, made.new):
                await room.disconnect()
