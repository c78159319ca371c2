"""One local connection of the broker: a job's WebSocket, whose contexts are mapped to the pool's contexts.

Frames from the job are parsed, because they are small and decide. Frames to the job are passed on as the
server sent them, with the job's context id in the place of the pool's. Two jobs may use the same id, and a
context may move between connections of the pool, so nothing but this mapping knows both ids.

The buffers of each local connection are bounded: frames of contexts that do not exist yet, and frames that
the job does not read. Past a bound contexts are cancelled, and the job is told.
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
    ALREADY_EXISTS,
    INVALID_ARGUMENT,
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

# Bytes of one frame from a job. Ours: Inworld takes 1,000 characters in one frame, and longer text is cut
# here.
MAX_REQUEST = 256 * 1024
# Bytes from one job that wait for contexts to exist. Ours: 16 contexts with all that one of them may keep.
MAX_PENDING = 1024 * 1024
# Bytes that one job has not read. Ours: over four minutes of 24 kHz 16-bit audio in base64.
MAX_UNREAD = 16 * 1024 * 1024
# Seconds for the closing handshake with a job. Ours: the job is on this machine.
CLOSE_HANDSHAKE_TIMEOUT = 0.5
# Inworld's names of operations in an error text, as in "Context X not found during sendText".
OPERATIONS = {
    Action.TEXT: "sendText",
    Action.FLUSH: "flushContext",
    Action.UPDATE: "updateConfig",
    Action.CLOSE: "closeContext",
    Action.CANCEL: "cancelContext",
}


class ClientContext:
    """One context of a job. The pool's frames go to the job under `name`, the job's id of the context."""

    __slots__ = ("client", "context", "name", "pending")

    def __init__(self, client: Client, name: str) -> None:
        self.client = client
        self.name = name
        # Bytes that the context was sent before it existed.
        self.pending = 0
        self.context: Context

    def on_frame(self, frame: Frame, context: Context) -> None:
        self.clear_pending()
        self.client.put(protocol.readdress(frame.text, context.id, self.name))

    def on_end(self, error: InworldError | None, frame: Frame | None, context: Context) -> None:
        self.clear_pending()
        self.client.forget(self)
        if error is None and frame is not None:
            self.client.put(protocol.readdress(frame.text, context.id, self.name))
        elif error is None or isinstance(error, ContextCancelled):
            result = {"contextId": self.name, "status": {"code": 0, "message": "", "details": []}}
            self.client.put(json.dumps({"result": {**result, "contextClosed": {}}}))
        else:
            # The server's text may name the context by the pool's id.
            message = str(error).replace(context.id or self.name, self.name)
            self.client.put(protocol.status(self.name, error.code, message))

    def clear_pending(self) -> None:
        """Stop counting what the pool keeps until the context exists."""
        self.client.pending -= self.pending
        self.pending = 0


class Client:
    """Serves one local WebSocket until its end, or until `close` is called."""

    def __init__(self, ws: web.WebSocketResponse, pool: InworldPool, *, max_unread: int) -> None:
        self.pending = 0
        self.contexts: dict[str, ClientContext] = {}
        self._ws = ws
        self._pool = pool
        self._max_unread = max_unread
        self._outbox = Outbox(max_unread)
        # True: `close` was called, and the job gets a close frame.
        self._leaving: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Serve. On every way out the job's contexts are cancelled at Inworld, at once."""
        try:
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(self._read())
                writing = group.create_task(self._write())
                if await self._leaving:
                    await self._shake_hands()
                reading.cancel()
                writing.cancel()
        finally:
            self._leave()
            for each in list(self.contexts.values()):
                self._pool.cancel(each.context)

    def put(self, text: str) -> None:
        """Send a frame to the job. A job that reads too little loses its contexts."""
        if self._leaving.done():
            return
        self._outbox.put(text)
        if self._outbox.size > self._max_unread:
            self._overflow()

    def forget(self, ended: ClientContext) -> None:
        self.contexts.pop(ended.name, None)

    def close(self) -> None:
        """Send what waits, then a close frame, and end."""
        self._leave(is_asked=True)

    # -- inside -------------------------------------------------------------------------------------------

    def _overflow(self) -> None:
        unread = self._outbox.size
        self._outbox.clear()
        error = Overflow(f"{unread} bytes are unread, at most {self._max_unread} are kept; read faster")
        log.warning("a job does not read its audio", extra={"unread": unread, "contexts": len(self.contexts)})
        for each in list(self.contexts.values()):
            self._pool.fail(each.context, error)

    def _leave(self, *, is_asked: bool = False) -> None:
        if not self._leaving.done():
            self._leaving.set_result(is_asked)

    async def _shake_hands(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_HANDSHAKE_TIMEOUT):
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
                self.put(protocol.status(None, INVALID_ARGUMENT, "a binary frame, expected JSON text"))
            else:
                break
        self._leave()

    async def _take(self, text: str) -> None:
        try:
            request = protocol.parse_request(text)
        except Malformed as error:
            self.put(protocol.status(None, INVALID_ARGUMENT, str(error)))
            return
        if request.action is Action.CREATE:
            self._create(request, len(text))
            return
        its = self._context_of(request)
        if its is None:
            return
        if not its.context.is_created:
            its.pending += len(text)
            self.pending += len(text)
            if self.pending > MAX_PENDING:
                what = f"{self.pending} bytes wait for contexts of this connection"
                self._pool.fail(its.context, Overflow(f"{what}, at most {MAX_PENDING} are kept"))
                return
        self._pool.send(its.context, request.action, request.document)
        try:
            await self._pool.room(its.context)
        except ConnectionLost:
            return  # the context's listener is told

    def _create(self, request: Request, size: int) -> None:
        name = request.context or ""
        if name in self.contexts:
            self.put(protocol.status(name, ALREADY_EXISTS, f"Context {name} already exists"))
            return
        if self.pending + size > MAX_PENDING:
            message = f"{self.pending} bytes wait for contexts of this connection, at most {MAX_PENDING} may"
            self.put(protocol.status(name, Overflow.code, message))
            return
        config = request.document["create"]
        new = ClientContext(self, name)
        self.contexts[name] = new
        new.pending = size
        self.pending += size
        try:
            new.context = self._pool.start(config if isinstance(config, dict) else {}, new)
        except PoolClosed as error:
            new.clear_pending()
            self.forget(new)
            self.put(protocol.status(name, error.code, str(error)))
        except BaseException:
            self.forget(new)  # it has no context that the end of this connection could cancel
            raise

    def _context_of(self, request: Request) -> ClientContext | None:
        """Return the context that a request is for, as Inworld finds it, or answer that there is none."""
        name = request.context
        key = request.action.value.upper() or "?"
        if name is None:
            if len(self.contexts) == 1:
                return next(iter(self.contexts.values()))
            count = len(self.contexts)
            text = f"context_id is required when {count} contexts are open (payload={key})"
            self.put(protocol.status(None, INVALID_ARGUMENT, text))
            return None
        found = self.contexts.get(name)
        if found is None:
            text = f"Context {name} not found during {OPERATIONS.get(request.action, key)}"
            self.put(protocol.status(name, NOT_FOUND, text))
        return found
