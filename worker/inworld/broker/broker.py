"""The broker: one pool for every job process of the machine, in Inworld's own protocol, on loopback.

    GET  /tts/v1/voice:streamBidirectional   WebSocket; see `client`
    POST /tts/v1/voice:stream                passed on; see `passthrough`
    GET  /tts/v1/voices                      passed on
    POST /lastcall/direct                    a job tells of a TTS that goes to Inworld beside the pool

A request needs the local token or a key of the pool, in the place where Inworld wants a key. That is the
header `Authorization: Basic <key>`, or `authorization` in the query with the same value. A request with
neither is answered with 401. Inworld gets the newest key, whichever a job has shown.
"""

from __future__ import annotations

import logging
import socket

from aiohttp import ClientError, WSCloseCode, web

from lastcall.worker.base import inworld_keys
from lastcall.worker.base.variables import INWORLD_TOKEN
from lastcall.worker.inworld.broker.client import (
    CLOSE_HANDSHAKE_TIMEOUT,
    MAX_REQUEST,
    MAX_UNREAD,
    Client,
)
from lastcall.worker.inworld.broker.passthrough import PassThrough
from lastcall.worker.inworld.plugin.arguments import DIRECT_PATH, DIRECT_REASONS
from lastcall.worker.inworld.pool.close_report import CloseReport
from lastcall.worker.inworld.pool.dialling import PATH
from lastcall.worker.inworld.pool.errors import UNAUTHENTICATED, UNAVAILABLE, UNKNOWN, LastcallFault
from lastcall.worker.inworld.pool.pool import InworldPool

log = logging.getLogger("lastcall.inworld")

# Bytes of one HTTP request. Ours: a text of 1,000 characters and its settings are a few kB.
MAX_BODY = 1024 * 1024


# Connections that wait to be accepted. Ours: more than the jobs of one machine.
BACKLOG = 1024


def listen(port: int = 0) -> socket.socket:
    """Return a socket that listens on loopback. Raises OSError when the port is taken."""
    return socket.create_server(("127.0.0.1", port), backlog=BACKLOG)


class Broker:
    """Serves a pool on a listening socket, which stays the caller's; use as an async context manager."""

    def __init__(
        self,
        pool: InworldPool,
        listener: socket.socket,
        *,
        token: str,
        key: str,
        base_url: str,
        proxy: str | None = None,
        max_unread: int = MAX_UNREAD,
    ) -> None:
        self.pool = pool
        self.clients: set[Client] = set()
        self.port: int = listener.getsockname()[1]
        self._listener = listener
        # TTS objects that go to Inworld beside the pool, and the reasons that were logged.
        self.direct = 0
        self._reasons: set[str] = set()
        self._token = token
        self._key = key
        self._accepts = [inworld_keys.digest(token, key)]
        self._max_unread = max_unread
        self._pass = PassThrough(base_url, proxy)
        self._is_closing = False
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_get(PATH, self._bidirectional)
        app.router.add_post("/tts/v1/voice:stream", self._plain)
        app.router.add_get("/tts/v1/voices", self._plain)
        app.router.add_post(DIRECT_PATH, self._direct)
        # A handler ends with its connection: so a killed job's contexts do.
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=CLOSE_HANDSHAKE_TIMEOUT, handler_cancellation=True
        )

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/"

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def set_key(self, key: str, accepts: str = "") -> None:
        """Use this key from now on; connections that stand keep theirs. `accepts`: digests of more keys."""
        self._key = key
        self._accepts = [inworld_keys.digest(self._token, key), *accepts.split()]
        self.pool.set_key(key)

    async def __aenter__(self) -> Broker:
        await self._pass.__aenter__()
        try:
            await self._runner.setup()
            # A duplicate: the site closes its socket, and the caller's is to outlive it.
            await web.SockSite(self._runner, self._listener.dup()).start()
        except BaseException:
            await self._pass.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.aclose()
        finally:
            await self._pass.__aexit__()

    async def aclose(self, deadline: float | None = None) -> CloseReport:
        """Refuse what is new, close the pool by the deadline, then the local connections; say how it went."""
        self._is_closing = True
        try:
            # The clients are closed last, because the broker still sends them the end of each context.
            return await self.pool.aclose(deadline)
        finally:
            for client in self.clients:
                client.close()
            await self._runner.cleanup()

    # -- requests -------------------------------------------------------------------------------------------

    def _refusal(self, request: web.Request) -> web.Response | None:
        given = request.headers.get("Authorization") or request.query.get("authorization", "")
        scheme, _, key = given.partition(" ")
        is_known = inworld_keys.is_known(key, token=self._token, digests=self._accepts)
        if scheme != "Basic" or not is_known:
            text = f"the key is neither the pool's nor the local token: see {INWORLD_TOKEN}"
            return _answer(401, UNAUTHENTICATED, text)
        if self._is_closing:
            return _answer(503, UNAVAILABLE, "the Inworld broker is closing")
        return None

    async def _bidirectional(self, request: web.Request) -> web.StreamResponse:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        ws = web.WebSocketResponse(timeout=CLOSE_HANDSHAKE_TIMEOUT, compress=False, max_msg_size=MAX_REQUEST)
        client = Client(ws, self.pool, max_unread=self._max_unread)
        self.clients.add(client)
        try:
            await ws.prepare(request)
            await client.run()
        except web.HTTPException:
            raise  # the answer to a request that is no upgrade
        except (OSError, ClientError) as error:
            log.info("a job went away", extra={"error": type(error).__name__})
        except Exception as error:
            self.pool.faults.note("a local connection", error)
            if ws.prepared:
                await ws.close(code=WSCloseCode.INTERNAL_ERROR)
        finally:
            self.clients.discard(client)
        return ws

    async def _plain(self, request: web.Request) -> web.StreamResponse:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        try:
            return await self._pass(request, self._key)
        except (web.HTTPException, OSError, ClientError):  # TimeoutError is an OSError
            raise  # an answer, or cuts a connection whose answer can't be completed
        except Exception as error:
            self.pool.faults.note("a local request", error)
            return _answer(500, UNKNOWN, str(LastcallFault(error)))

    async def _direct(self, request: web.Request) -> web.StreamResponse:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        self.direct += 1
        # The log repeats nothing that a job says.
        reason = DIRECT_REASONS.get(await request.text())
        if reason is not None and reason not in self._reasons:
            self._reasons.add(reason)
            log.warning("a TTS goes to Inworld beside the pool", extra={"reason": reason})
        return web.Response(status=204)


def _answer(status: int, code: int, message: str) -> web.Response:
    return web.json_response({"code": code, "message": message, "details": []}, status=status)
