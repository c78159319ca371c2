"""One client's connection to the local Inworld server: its contexts, from create to contextClosed.

    client -> server   create, send_text, flush_context, update_config, close_context, cancel_context
    server -> client   contextCreated, audioChunk, flushCompleted, contextUpdated, contextClosed, errors

JSON text frames, one payload key beside `contextId`, which may be left out while one context is open. Each
context has a task, which takes the frames of the context in order. So a slow create or a long speech holds up
no other context. A cancel is acted on at once. A context is counted until contextClosed is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

from lastcall.worker.local.inworld_settings import EventKind, Faults, Limits
from lastcall.worker.local.speech import Speech

# Seconds between two looks of a connection that was told to stop reading. Ours: a test changes a plain value.
READ_POLL_INTERVAL = 0.02
# Frames of one context that wait for the context's task; beyond them the connection is not read. Ours: more
# than any test sends before it reads.
MAX_QUEUED_FRAMES = 1000
MALFORMED_FRAMES = {"text": "this is not JSON", "null": '{"result": null}', "list": '["contextCreated"]'}
# Inworld's names of operations in an error text.
OPERATIONS = {
    "send_text": "sendText",
    "flush_context": "flushContext",
    "update_config": "updateConfig",
    "close_context": "closeContext",
    "cancel_context": "cancelContext",
}

Emit = Callable[..., None]


class ServerContext:
    """One utterance stream. `config` is what its create and update_config said."""

    __slots__ = ("config", "frames", "has_spoken", "id", "pending", "task")

    def __init__(self, id: str, config: dict[str, Any]) -> None:
        self.id = id
        self.config = config
        self.frames: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue(MAX_QUEUED_FRAMES)
        self.pending = ""
        self.has_spoken = False
        self.task: asyncio.Task[None]

    @property
    def sample_rate(self) -> int:
        return int(self.config.get("audioConfig", {}).get("sampleRateHertz", 24000))

    @property
    def needs_header(self) -> bool:
        return bool(self.config.get("audioConfig", {}).get("audioEncoding") == "LINEAR16")

    @property
    def threshold(self) -> int:
        """How many characters are buffered before they are spoken without a flush."""
        return 1 if self.config.get("autoMode") else int(self.config.get("bufferCharThreshold", 1000))


class ServerConnection:
    """Serves one WebSocket until it ends; `contexts` is what the server counts."""

    def __init__(
        self,
        number: int,
        ws: web.WebSocketResponse,
        transport: asyncio.Transport | None,
        *,
        limits: Limits,
        faults: Faults,
        speech: Speech,
        emit: Emit,
        is_cut: Callable[[], bool],
    ) -> None:
        self.number = number
        self.ws = ws
        self.contexts: dict[str, ServerContext] = {}
        self.close_code = aiohttp.WSCloseCode.ABNORMAL_CLOSURE.value
        self.is_clean = False
        self._transport = transport
        self._limits = limits
        self._faults = faults
        self._speech = speech
        self._emit_event = emit
        self._is_cut = is_cut
        self._active_at = time.monotonic()
        self._is_closing = False
        self._group: asyncio.TaskGroup

    async def serve(self) -> None:
        """Serve until the connection has ended; afterwards no context is open."""
        try:
            async with asyncio.TaskGroup() as self._group:
                watching = self._group.create_task(self._close_when_idle())
                await self._read()
                if not self._is_closing:
                    watching.cancel()
                for context in self.contexts.values():
                    context.task.cancel()
        finally:
            for context in self.contexts.values():
                self._emit("context_cut", context.id)
            self.contexts.clear()

    async def close(self, code: int) -> None:
        """Close the connection from this side."""
        self._is_closing = True
        self.close_code = code
        await self.ws.close(code=code)

    def abort(self) -> None:
        """Cut the connection without a close frame, as a broken network does."""
        if self._transport is not None:
            self._transport.abort()

    async def send_raw(self, text: str) -> None:
        """Send a text frame as it is."""
        with contextlib.suppress(ConnectionError):  # the reader is about to see the end
            await self.ws.send_str(text)

    # -- frames in ------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            frame = await self.ws.receive()
            while self._faults.stop_reading:  # noqa: ASYNC110  # a plain value that a test changes
                await asyncio.sleep(READ_POLL_INTERVAL)
            if frame.type is aiohttp.WSMsgType.TEXT:
                self._active_at = time.monotonic()
                if self._is_cut():
                    self.abort()
                    return
                await self._take(frame.data)
            elif frame.type is aiohttp.WSMsgType.CLOSE:
                self.close_code, self.is_clean = frame.data, True
                if self._faults.ignore_close:
                    await _forever()  # until the client drops the connection, which cancels the handler
                await self.ws.close(code=frame.data or 1000)
                return
            elif frame.type is aiohttp.WSMsgType.PING:
                self._emit("ping")
                if not self._faults.ping_unanswered:
                    await self.ws.pong(frame.data)
            elif frame.type not in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.PONG):
                return

    async def _take(self, text: str) -> None:
        try:
            message = json.loads(text)
            key = next(key for key in message if key in OPERATIONS or key == "create")
            body = message[key] or {}
        except (ValueError, TypeError, StopIteration):
            await self._fail_connection(self._faults.codes.invalid, "unknown payload")
            return
        id = str(message.get("contextId") or message.get("context_id") or "")
        if key == "create":
            await self._create(id, body)
            return
        if not id:
            if len(self.contexts) != 1:
                count = len(self.contexts)
                text = f"context_id is required when {count} contexts are open (payload={key.upper()})"
                await self._fail_connection(self._faults.codes.invalid, text)
                return
            id = next(iter(self.contexts))
        context = self.contexts.get(id)
        if context is None:
            await self._fail(
                id, self._faults.codes.not_found, f"Context {id} not found during {OPERATIONS[key]}"
            )
        elif key == "cancel_context":
            await self._cancel(context)
        else:
            if key == "close_context":
                self._emit("close_requested", id)
            await context.frames.put((key, body))

    async def _create(self, id: str, config: dict[str, Any]) -> None:
        codes = self._faults.codes
        if self._faults.create_error:
            self._emit("context_refused", id, reason=self._faults.create_error)
            if self._faults.create_error == "status":
                await self._fail(id, codes.invalid, "Invalid voice for context")
            else:
                await self._fail_connection(codes.failed, "internal error")
        elif id in self.contexts:
            self._emit("context_refused", id, reason="exists")
            await self._fail(id, codes.exists, f"Context {id} already exists")
        elif len(self.contexts) >= self._limits.contexts:
            self._emit("context_refused", id, reason="limit")
            await self._fail(id, codes.context_limit, "Max contexts limit reached")
        else:
            context = self.contexts[id] = ServerContext(id, config)
            self._emit("context_created", id, voice=config.get("voiceId", ""))
            context.task = self._group.create_task(self._live(context))

    async def _cancel(self, context: ServerContext) -> None:
        self._emit("cancel_requested", context.id)
        if self._faults.cancel == "error":
            await self._fail(context.id, self._faults.codes.invalid, "unknown payload")
        elif self._faults.cancel == "top-level":
            await self._fail_connection(self._faults.codes.invalid, "unknown payload")
        elif self._faults.cancel == "supported":
            context.task.cancel()
            context.task = self._group.create_task(self._end(context))

    # -- one context ----------------------------------------------------------------------------------

    async def _live(self, context: ServerContext) -> None:
        await _wait(self._faults.create_delay)
        if self._faults.create_unanswered:
            await _forever()
        if self._faults.malformed:
            await self.send_raw(MALFORMED_FRAMES[self._faults.malformed])
        await self._send(context.id, contextCreated=context.config)
        handlers: dict[str, Callable[[ServerContext, dict[str, Any]], Awaitable[None]]] = {
            "send_text": self._on_text,
            "flush_context": self._on_flush,
            "update_config": self._on_update,
        }
        while self.contexts.get(context.id) is context:
            patience = context.config.get("maxBufferDelayMs", 3000) / 1000 if context.pending else None
            try:
                async with asyncio.timeout(patience):
                    key, body = await context.frames.get()
            except TimeoutError:
                await self._speak(context)
                continue
            if key == "close_context":
                if context.pending:
                    await self._speak(context)
                await self._end(context)
                return
            await handlers[key](context, body)

    async def _on_text(self, context: ServerContext, body: dict[str, Any]) -> None:
        text = str(body.get("text", ""))
        self._emit("text", context.id, chars=len(text))
        if len(text) > self._limits.text:
            message = f"Text is {len(text)} characters long, more than {self._limits.text}"
            await self._fail_within(context, self._faults.codes.text_limit, message)
            return
        context.pending += text
        if "flush_context" in body:
            await self._on_flush(context, body)
        elif len(context.pending) >= min(context.threshold, self._limits.text):
            await self._speak(context)

    async def _on_flush(self, context: ServerContext, _body: dict[str, Any]) -> None:
        self._emit("flush", context.id)
        await self._speak(context)

    async def _on_update(self, context: ServerContext, body: dict[str, Any]) -> None:
        context.config = {**context.config, **body}
        if context.pending:
            await self._speak(context)
        await self._send(context.id, contextUpdated=body)

    async def _speak(self, context: ServerContext) -> None:
        """Synthesise what is buffered: one generation, which ends with flushCompleted."""
        text, context.pending = context.pending, ""
        speech = self._speech
        kind = str(context.config.get("timestampType", ""))
        timed = kind in ("WORD", "CHARACTER") and text != ""
        in_step = context.config.get("timestampTransportStrategy") == "SYNC"
        if text:
            await _wait(speech.first_delay)
        began = time.monotonic()
        header = context.needs_header and not context.has_spoken
        context.has_spoken = context.has_spoken or bool(text)
        for number, content in enumerate(speech.chunks(text, context.sample_rate, header=header), 1):
            chunk: dict[str, Any] = {"audioContent": content}
            if timed and in_step and number == 1:
                chunk["timestampInfo"] = speech.alignment(text, kind)
            await self._send(context.id, audioChunk=chunk)
            if self._faults.speech_error:
                await self._fail_within(context, self._faults.codes.failed, "synthesis failed")
                return
            if speech.pace == "real-time":
                await _wait(began + number * speech.chunk_ms / 1000 - time.monotonic())
        if timed and not in_step:
            chunk = {"timestampInfo": speech.alignment(text, kind)}
            await self._send(context.id, audioChunk=chunk)
        await self._send(context.id, flushCompleted={})

    async def _end(self, context: ServerContext) -> None:
        if self._faults.closed_never:
            await _forever()
        await _wait(self._faults.closed_delay)
        del self.contexts[context.id]
        self._emit("context_closed", context.id)
        await self._send(context.id, contextClosed={})

    # -- frames out -----------------------------------------------------------------------------------

    async def _send(self, id: str, **result: Any) -> None:
        self._active_at = time.monotonic()
        status = {"code": 0, "message": "", "details": []}
        await self.send_raw(json.dumps({"result": {"contextId": id, "status": status, **result}}))

    async def _fail_within(self, context: ServerContext, code: int, message: str) -> None:
        if self._faults.error_ends_context:
            del self.contexts[context.id]
            self._emit("context_closed", context.id, reason="error")
        await self._fail(context.id, code, message)

    async def _fail(self, id: str, code: int, message: str) -> None:
        self._emit("error", id, code=code, message=message)
        status = {"code": code, "message": message, "details": []}
        await self.send_raw(json.dumps({"result": {"contextId": id, "status": status}}))

    async def _fail_connection(self, code: int, message: str) -> None:
        self._emit("error", code=code, message=message)
        await self.send_raw(json.dumps({"error": {"code": code, "message": message}}))

    async def _close_when_idle(self) -> None:
        while True:
            left = self._active_at + self._limits.idle - time.monotonic()
            if left <= 0:
                await self.close(self._faults.idle_close_code)
                return
            await asyncio.sleep(left)

    def _emit(self, kind: EventKind, context: str = "", **detail: Any) -> None:
        self._emit_event(kind, self.number, context, **detail)


async def _wait(seconds: float) -> None:
    if seconds > 0:
        await asyncio.sleep(seconds)


async def _forever() -> None:
    await asyncio.get_running_loop().create_future()
