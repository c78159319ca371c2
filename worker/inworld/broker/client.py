"""One local connection of the broker: a job's own WebSocket, its contexts mapped to the pool's.

Frames from the job are parsed, because they are small and decide; frames to it are passed on as they came,
with the job's own context id in the place of the pool's. Ids of different jobs may be the same, and a context
may move between connections of the pool, so nothing but this mapping knows both.

What is buffered is bounded for each local connection: frames of contexts that do not exist yet, and frames
that the job does not read. Past a bound contexts are cancelled, and told.
"""

from __future__ import annotations

import asyncio
import json
import logging

import aiohttp
from aiohttp import web

from lastcall.worker.inworld.pool import protocol
from lastcall.worker.inworld.pool.context import Context
from lastcall.worker.inworld.pool.errors import (
    NOT_FOUND,
    ConnectionLost,
    ContextCancelled,
    InworldError,
    Malformed,
    Overflow,
    PoolClosed,
)
from lastcall.worker.inworld.pool.outbox import Outbox
from lastcall.worker.inworld.pool.pool import InworldPool
from lastcall.worker.inworld.pool.protocol import Action, Frame, Request

log = logging.getLogger("lastcall.inworld")

INVALID = 3
EXISTS = 6
MAX_REQUEST = 256 * 1024
MAX_PENDING = 1024 * 1024
GOODBYE = 0.5
ENDS = {
    Action.TEXT: "sendText",
    Action.FLUSH: "flushContext",
    Action.UPDATE: "updateConfig",
    Action.CLOSE: "closeContext",
    Action.CANCEL: "cancelContext",
}


class Voice:
    """One context of a job: what the pool tells goes to the job under the job's own id."""

    __slots__ = ("client", "context", "name", "pending")

    def __init__(self, client: Client, name: str) -> None:
        self.client = client
        self.name = name
        self.pending = 0
        self.context: Context

    def on_frame(self, frame: Frame, context: Context) -> None:
        self.settle()
        self.client.put(protocol.readdress(frame.text, context.id, self.name))

    def on_end(self, error: InworldError | None, frame: Frame | None, context: Context) -> None:
        self.settle()
        self.client.forget(self)
        if error is None and frame is not None:
            self.client.put(protocol.readdress(frame.text, context.id, self.name))
        elif error is None or isinstance(error, ContextCancelled):
            result = {"contextId": self.name, "status": {"code": 0, "message": "", "details": []}}
            self.client.put(json.dumps({"result": {**result, "contextClosed": {}}}))
        else:
            # The server's own text may speak of the context by the pool's name for it.
            message = str(error).replace(context.id or self.name, self.name)
            self.client.put(protocol.status(self.name, error.code, message))

    def settle(self) -> None:
        """Stop counting what was kept until the context existed."""
        self.client.pending -= self.pending
        self.pending = 0


class Client:
    """Serves one local WebSocket until it ends, or `close` is called."""

    def __init__(self, ws: web.WebSocketResponse, pool: InworldPool, *, max_unread: int) -> None:
        self.pending = 0
        self.voices: dict[str, Voice] = {}
        self._ws = ws
        self._pool = pool
        self._max_unread = max_unread
        self._outbox = Outbox(max_unread)
        self._leaving: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Serve. On every way out the job's contexts are cancelled upstream, at once."""
        try:
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(self._read())
                writing = group.create_task(self._write())
                if await self._leaving:
                    await self._say_goodbye()
                reading.cancel()
                writing.cancel()
        finally:
            self._leave()
            for voice in list(self.voices.values()):
                voice.context.cancel()

    def put(self, text: str) -> None:
        """Send a frame to the job; one that reads too little loses its contexts."""
        if self._leaving.done():
            return
        self._outbox.put(text)
        if self._outbox.size > self._max_unread:
            self._overflow()

    def forget(self, voice: Voice) -> None:
        self.voices.pop(voice.name, None)

    def close(self) -> None:
        """Send what waits, and a close frame, and end."""
        self._leave(is_asked=True)

    # -- inside -------------------------------------------------------------------------------------------

    def _overflow(self) -> None:
        unread = self._outbox.size
        self._outbox.clear()
        error = Overflow(f"{unread} bytes are unread, at most {self._max_unread} are kept; read faster")
        log.warning("a job does not read its audio", extra={"unread": unread, "contexts": len(self.voices)})
        for voice in list(self.voices.values()):
            voice.context.fail(error)

    def _leave(self, *, is_asked: bool = False) -> None:
        if not self._leaving.done():
            self._leaving.set_result(is_asked)

    async def _say_goodbye(self) -> None:
        try:
            async with asyncio.timeout(GOODBYE):
                await self._outbox.flushed()
                await self._ws.close(code=aiohttp.WSCloseCode.GOING_AWAY)
        except TimeoutError:
            log.info("a job does not answer the close of its connection")

    async def _write(self) -> None:
        try:
            await self._outbox.write(self._ws.send_str, lambda at: None)
        except ConnectionError:
            self._leave()

    async def _read(self) -> None:
        while True:
            message = await self._ws.receive()
            if message.type is aiohttp.WSMsgType.TEXT:
                await self._take(message.data)
            elif message.type is aiohttp.WSMsgType.BINARY:
                self.put(protocol.status(None, INVALID, "a binary frame, expected JSON text"))
            else:
                break
        self._leave()

    async def _take(self, text: str) -> None:
        try:
            request = protocol.parse_request(text)
        except Malformed as error:
            self.put(protocol.status(None, INVALID, str(error)))
            return
        if request.action is Action.CREATE:
            self._create(request, len(text))
            return
        voice = self._voice(request)
        if voice is None:
            return
        context = voice.context
        if not context.is_created:
            voice.pending += len(text)
            self.pending += len(text)
            if self.pending > MAX_PENDING:
                what = f"{self.pending} bytes wait for contexts of this connection"
                context.fail(Overflow(f"{what}, at most {MAX_PENDING} are kept"))
                return
        context.send(request.action, request.document)
        if context.connection is not None:
            try:
                await context.connection.room()
            except ConnectionLost:
                return  # the context hears of it by itself

    def _create(self, request: Request, size: int) -> None:
        name = request.context or ""
        if name in self.voices:
            self.put(protocol.status(name, EXISTS, f"Context {name} already exists"))
            return
        if self.pending + size > MAX_PENDING:
            message = f"{self.pending} bytes wait for contexts of this connection, at most {MAX_PENDING} may"
            self.put(protocol.status(name, Overflow.code, message))
            return
        config = request.document["create"]
        voice = Voice(self, name)
        self.voices[name] = voice
        voice.pending = size
        self.pending += size
        try:
            voice.context = self._pool.start(config if isinstance(config, dict) else {}, voice)
        except PoolClosed as error:
            voice.settle()
            self.forget(voice)
            self.put(protocol.status(name, error.code, str(error)))

    def _voice(self, request: Request) -> Voice | None:
        """Return the context that a request is for, as Inworld finds it, or answer that there is none."""
        name = request.context
        key = request.action.value.upper() or "?"
        if name is None:
            if len(self.voices) == 1:
                return next(iter(self.voices.values()))
            count = len(self.voices)
            text = f"context_id is required when {count} contexts are open (payload={key})"
            self.put(protocol.status(None, INVALID, text))
            return None
        voice = self.voices.get(name)
        if voice is None:
            text = f"Context {name} not found during {ENDS.get(request.action, key)}"
            self.put(protocol.status(name, NOT_FOUND, text))
        return voice
