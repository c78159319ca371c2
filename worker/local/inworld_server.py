"""Inworld's text-to-speech service, on one machine: its protocol, limits, error texts and faults.

    GET  /tts/v1/voice:streamBidirectional   WebSocket, see `inworld_connection`
    POST /tts/v1/voice:stream                one text in, lines of JSON with audio out
    GET  /tts/v1/voices                      the voices

Every request needs `Authorization: Basic <key>` (or `?authorization=`), else 401. A connection beyond the
account's limit gets 429 on its upgrade. Nothing here was compared with the real service: limits and texts are
the published ones and those seen in the wild, what is guessed is a setting (`inworld_settings`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web

from lastcall.worker.base.condition import Condition
from lastcall.worker.local.inworld_connection import ServerConnection
from lastcall.worker.local.inworld_settings import Codes, Event, EventKind, Faults, Limits
from lastcall.worker.local.speech import Speech

__all__ = ["Codes", "Event", "Faults", "InworldServer", "Limits", "Speech"]

STREAM_PATH = "/tts/v1/voice:streamBidirectional"
# Events that are kept. Ours: several times what the largest test makes.
MAX_EVENTS = 200_000
# Seconds for a closing handshake, and for handlers at the end. Ours: client and server share a machine.
CLOSE_TIMEOUT = 1.0
VOICES = ("Ashley", "Dennis", "Alex")


class InworldServer:
    """Serve Inworld's protocol on loopback; use as an async context manager.

    `limits`, `faults` and `speech` may be changed while it serves. The counters are what the server counts: a
    context until contextClosed was sent or its connection went. `seed` is for `faults.cut_rate`.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        faults: Faults | None = None,
        speech: Speech | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str = "",
        seed: int | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.faults = faults or Faults()
        self.speech = speech or Speech()
        self.host = host
        self.port = port
        self.api_key = api_key or secrets.token_urlsafe(24)
        self.connections: dict[int, ServerConnection] = {}
        self.events: list[Event] = []
        self.counts: Counter[str] = Counter()
        self.peak_connections = 0
        self.peak_contexts = 0
        self._lingering = 0
        self._on_event = on_event
        self._random = random.Random(seed)
        self._numbers = 0
        self._transports: set[asyncio.Transport] = set()
        self._changed = Condition()
        self._runner: web.AppRunner | None = None
        self._app = web.Application()
        self._app.router.add_get(STREAM_PATH, self._bidirectional)
        self._app.router.add_post("/tts/v1/voice:stream", self._stream)
        self._app.router.add_get("/tts/v1/voices", self._voices)

    @property
    def ws_url(self) -> str:
        return f"ws://{self.host}:{self.port}/"

    @property
    def base_url(self) -> str:
        return f"http://{self.host}:{self.port}/"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a client of this server needs beside its URLs."""
        return {"INWORLD_API_KEY": self.api_key}

    @property
    def open_connections(self) -> int:
        return len(self.connections)

    @property
    def open_handshakes(self) -> int:
        return len(self._transports) - len(self.connections)

    @property
    def open_contexts(self) -> int:
        return sum(len(connection.contexts) for connection in self.connections.values())

    async def __aenter__(self) -> InworldServer:
        self._runner = web.AppRunner(
            self._app, access_log=None, shutdown_timeout=CLOSE_TIMEOUT, handler_cancellation=True
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, self.port).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        for transport in list(self._transports):
            transport.abort()
        assert self._runner is not None
        await self._runner.cleanup()

    # -- what callers do ------------------------------------------------------------------------------

    def cut_connections(self) -> None:
        """Drop every connection without a close frame, as a broken network does."""
        for connection in list(self.connections.values()):
            connection.abort()

    async def close_connections(self, code: int = 1001) -> None:
        """Close every connection from this side."""
        await asyncio.gather(*(each.close(code) for each in list(self.connections.values())))

    async def send_raw(self, text: str) -> None:
        """Send a text frame as it is on every connection."""
        await asyncio.gather(*(each.send_raw(text) for each in list(self.connections.values())))

    def events_of(self, kind: EventKind) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    async def until(self, predicate: Callable[[], object], timeout: float) -> None:
        """Wait until the predicate holds; it is looked at after every event. Raises TimeoutError."""
        async with asyncio.timeout(timeout):
            await self._changed.until(predicate)

    # -- requests -------------------------------------------------------------------------------------

    def _may_use(self, request: web.Request) -> bool:
        given = request.headers.get("Authorization") or request.query.get("authorization", "")
        return secrets.compare_digest(given.encode(), f"Basic {self.api_key}".encode())

    async def _bidirectional(self, request: web.Request) -> web.StreamResponse:
        transport = request.transport
        if transport is None:
            return web.Response(status=400)
        self._transports.add(transport)
        try:
            return await self._upgrade(request, transport)
        finally:
            self._transports.discard(transport)

    async def _upgrade(self, request: web.Request, transport: asyncio.Transport) -> web.StreamResponse:
        if self.faults.handshake_delay:
            await asyncio.sleep(self.faults.handshake_delay)
        if self.faults.handshake_hang:
            # The client's end of the connection cancels the handler.
            await asyncio.get_running_loop().create_future()
        if self.faults.handshake_cut:
            transport.abort()
            return web.Response()  # which nobody gets
        status = self._refusal(request)
        if status:
            self._emit("refused", status=status)
            return web.json_response({"code": status, "message": "refused", "details": []}, status=status)
        ws = web.WebSocketResponse(autoclose=False, autoping=False, timeout=CLOSE_TIMEOUT, compress=False)
        self._numbers += 1
        connection = ServerConnection(
            self._numbers,
            ws,
            transport,
            limits=self.limits,
            faults=self.faults,
            speech=self.speech,
            emit=self._emit,
            is_cut=lambda: self.faults.cut_rate > 0 and self._random.random() < self.faults.cut_rate,
        )
        # Counted before the answer is on its way: two upgrades at once can't both be the last one.
        self.connections[connection.number] = connection
        self.peak_connections = max(self.peak_connections, self.open_connections)
        try:
            await ws.prepare(request)
            self._emit("connected", connection.number)
            await connection.serve()
        finally:
            del self.connections[connection.number]
            code, clean = connection.close_code, connection.is_clean
            self._linger()
            self._emit("connection_closed", connection.number, code=code, clean=clean)
        return ws

    def _refusal(self, request: web.Request) -> int:
        if self.faults.handshake_status:
            return self.faults.handshake_status
        if not self._may_use(request):
            return 401
        if self.open_connections + self._lingering >= self.limits.connections:
            return 429
        return 0

    def _linger(self) -> None:
        if self.faults.linger:
            self._lingering += 1
            asyncio.get_running_loop().call_later(self.faults.linger, self._forget)

    def _forget(self) -> None:
        self._lingering -= 1

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        refused = self._refused_plainly(request)
        if refused is not None:
            return refused
        body = await request.json()
        text = str(body.get("text", ""))
        audio = body.get("audioConfig", {})
        rate = int(audio.get("sampleRateHertz", 24000))
        header = audio.get("audioEncoding") == "LINEAR16"
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        kind = str(body.get("timestampType", ""))
        result: dict[str, Any] = {}
        if kind in ("WORD", "CHARACTER"):
            result["timestampInfo"] = self.speech.alignment(text, kind)
        for chunk in self.speech.chunks(text, rate, header=header):
            line = json.dumps({"result": {**result, "audioContent": chunk}})
            await response.write(line.encode() + b"\n")
            result = {}
            if self.speech.pace == "real-time":
                await asyncio.sleep(self.speech.chunk_ms / 1000)
        await response.write_eof()
        return response

    async def _voices(self, request: web.Request) -> web.StreamResponse:
        refused = self._refused_plainly(request)
        if refused is not None:
            return refused
        voices = [{"voiceId": name, "displayName": name, "languages": ["en"]} for name in VOICES]
        return web.json_response({"voices": voices})

    def _refused_plainly(self, request: web.Request) -> web.Response | None:
        status = self.faults.http_status or (0 if self._may_use(request) else 401)
        if not status:
            return None
        return web.json_response({"code": status, "message": "refused", "details": []}, status=status)

    def _emit(self, kind: EventKind, connection: int = 0, context: str = "", **detail: Any) -> None:
        event = Event(at=time.monotonic(), kind=kind, connection=connection, context=context, detail=detail)
        if kind == "context_created":
            self.peak_contexts = max(self.peak_contexts, len(self.connections[connection].contexts))
        self.counts[kind] += 1
        self.events.append(event)
        if len(self.events) > MAX_EVENTS:
            del self.events[: MAX_EVENTS // 10]
        if self._on_event is not None:
            self._on_event(event)
        self._changed.notify()


async def serve(server: InworldServer) -> None:
    """Serve until SIGTERM, SIGINT or the end of standard input; one line of JSON says where."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if not os.isatty(0):
        loop.add_reader(0, lambda: stop.set() if not os.read(0, 1024) else None)
    async with server:
        where = {"ws_url": server.ws_url, "base_url": server.base_url, "environment": server.environment}
        print(json.dumps(where), flush=True)
        await stop.wait()


def main() -> None:
    """Read the command line and serve."""
    limits, speech = Limits(), Speech()
    parser = argparse.ArgumentParser(
        prog="python -m lastcall.worker.local.inworld_server", description=serve.__doc__
    )
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--key", default="", help="the API key; random if left out")
    parser.add_argument("--connections", type=int, default=limits.connections, help="for the account")
    parser.add_argument("--contexts", type=int, default=limits.contexts, help="on one connection")
    parser.add_argument("--text", type=int, default=limits.text, help="characters in one send_text")
    parser.add_argument("--idle", type=float, default=limits.idle, help="seconds")
    parser.add_argument("--pace", choices=("instant", "real-time"), default="real-time")
    parser.add_argument("--sound", choices=("silence", "tone"), default=speech.sound)
    parser.add_argument("--chunk-ms", type=int, default=speech.chunk_ms)
    parser.add_argument("--handshake-delay", type=float, default=0.0, help="seconds")
    given = parser.parse_args()
    limits = Limits(connections=given.connections, contexts=given.contexts, text=given.text, idle=given.idle)
    speech = Speech(pace=given.pace, sound=given.sound, chunk_ms=given.chunk_ms)
    faults = Faults(handshake_delay=given.handshake_delay)
    server = InworldServer(limits=limits, faults=faults, speech=speech, port=given.port, api_key=given.key)
    try:
        asyncio.run(serve(server))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
