"""HTTP for probes and scrapes: /livez, /readyz, /status, /metrics.

    client      GET /readyz HTTP/1.1\r\n … \r\n\r\n
    supervisor  HTTP/1.1 200 OK\r\n … \r\n\r\nok\n

One request, one answer, then the connection is closed, as on the control socket. The bodies of requests are
not read. Each client has a deadline, a bound on its request, and there is a bound on clients at once. The
server is this small because a general one costs a supervisor 15 MB, and the first worker 0.15 s of its start.
"""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lastcall.supervisor.config.user_files import words_of
from lastcall.supervisor.errors import ConfigError
from lastcall.supervisor.views.status import Status
from lastcall.worker.base.records import dataclass

if TYPE_CHECKING:
    from lastcall.supervisor.views.metrics import Metrics

# Seconds between two tries to get a port that another program has. Ours: such a program is about to end, or
# will not end.
RETRY_EVERY = 1.0
# Seconds that one try may take. Ours: only the look for the name of a host takes any, and workers start after
# the first try.
RESOLVE_WITHIN = 2.0
# Bytes of a line of a request, and its lines. Ours: more than any probe or scrape sends.
MAX_LINE = 8 * 1024
MAX_LINES = 100
# Clients at a time; further ones are closed at once. Ours: probes and a few scrapers.
MAX_CLIENTS = 64
# Seconds from the connection to the last byte of the answer. Prometheus waits 10 s for a scrape
# (`scrape_timeout`), and the kubelet 1 s for a probe.
TIMEOUT = 10.0
# The reasons for another try, and the log events of each.
BUSY, UNRESOLVED = "busy", "not resolved"
WAITS = {BUSY: "http port is busy", UNRESOLVED: "http host is not resolved"}
OVER = {BUSY: "http port is free now", UNRESOLVED: "http host is resolved now"}
TEXT = "text/plain; charset=utf-8"
JSON = "application/json; charset=utf-8"


@dataclass(frozen=True, slots=True)
class _Answer:
    """The answer to one request."""

    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    type: str = TEXT


_Route = Callable[[], Awaitable[_Answer]]


@asynccontextmanager
async def serve(address: str, status: Status, log: Any) -> AsyncIterator[str]:
    """Serve on HOST:PORT for as long as the block runs; "off" serves nothing.

    Yields the address in use. Another program may have the port, or the resolver may be slow; the reason then
    stands behind the address. The address is tried again while the block runs, because calls need no HTTP.
    Raises ConfigError for an address that can't be had at all.
    """
    if address == "off":
        yield address
        return
    host, _, port = address.rpartition(":")
    site = _Site(host.strip("[]"), port, _routes(status), log)
    waiting: asyncio.Task[None] | None = None
    try:
        try:
            wait = await _try(site)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"http: {address} can't be used: {words_of(error)};"
                " give another HOST:PORT by --http, or --http off"
            ) from error
        if wait:
            log.warning(WAITS[wait], http=address, tried_again_every_s=RETRY_EVERY)
            waiting = asyncio.create_task(_try_again(site, wait, address, log))
        yield f"{address} ({wait})" if wait else f"{host}:{site.port}"
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait({waiting})
        site.stop()


class _Site:
    """The listening sockets of one address, and the clients on them."""

    def __init__(self, host: str, port: str, routes: dict[str, _Route], log: Any) -> None:
        self._host = host
        self._port = port
        self._routes = routes
        self._log = log
        self._clients = 0
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port that the kernel has given, once it is listened on."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def start(self) -> None:
        """Begin to listen. Raises OSError, ValueError and OverflowError."""
        self._server = await asyncio.start_server(
            self._serve, self._host, int(self._port), limit=MAX_LINE, backlog=128
        )

    def stop(self) -> None:
        """Listen no more. The clients of this moment end with the loop, or by their deadlines."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            if self._clients <= MAX_CLIENTS:
                writer.transport.set_write_buffer_limits(0)  # `drain` is to return once all has been sent
                async with asyncio.timeout(TIMEOUT):
                    await self._answer(reader, writer)
        except (TimeoutError, OSError, ValueError):
            pass  # a client that is slow, gone or talks nonsense has only itself to inform
        finally:
            self._clients -= 1
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readline()).decode("latin-1").split()
        for _ in range(MAX_LINES):
            if not (await reader.readline()).strip():
                break
        else:
            raise ValueError("too many lines")
        if len(request) != 3 or not request[2].startswith("HTTP/1."):
            raise ValueError("no request of HTTP/1")
        method, target, _ = request
        answer = await self._look_up(method, urlsplit(target).path)
        head = [
            f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
            f"Date: {formatdate(usegmt=True)}",
            f"Content-Type: {answer.type}",
            f"Content-Length: {len(answer.body)}",
            "Connection: close",
            *(["Allow: GET, HEAD"] if answer.status is HTTPStatus.METHOD_NOT_ALLOWED else []),
        ]
        writer.write("\r\n".join([*head, "", ""]).encode() + (b"" if method == "HEAD" else answer.body))
        await writer.drain()

    async def _look_up(self, method: str, path: str) -> _Answer:
        route = self._routes.get(path)
        if route is None:
            return _Answer(b"404: Not Found", HTTPStatus.NOT_FOUND)
        if method not in ("GET", "HEAD"):
            return _Answer(b"405: Method Not Allowed", HTTPStatus.METHOD_NOT_ALLOWED)
        try:
            return await route()
        except TimeoutError:
            raise
        except Exception as error:
            self._log.error("fault in lastcall", where=f"http {path}", exc_info=error)
            return _Answer(b"500: Internal Server Error", HTTPStatus.INTERNAL_SERVER_ERROR)


async def _try(site: _Site) -> str:
    """Begin to listen; return why another try is needed, or nothing. Raises OSError for any other reason."""
    try:
        async with asyncio.timeout(RESOLVE_WITHIN):
            await site.start()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return BUSY
        # At boot the name server may come later than lastcall.
        is_early = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        if is_early or isinstance(error, TimeoutError):
            return UNRESOLVED
        raise
    return ""


async def _try_again(site: _Site, wait: str, address: str, log: Any) -> None:
    try:
        while True:
            await asyncio.sleep(RETRY_EVERY)
            before, wait = wait, await _try(site)
            if not wait:
                log.info(OVER[before], http=address)
                return
            if wait != before:
                log.warning(WAITS[wait], http=address, tried_again_every_s=RETRY_EVERY)
    except OSError as error:
        log.error("http port can't be had", http=address, reason=words_of(error))


def _routes(status: Status) -> dict[str, _Route]:
    async def livez() -> _Answer:
        return _Answer(b"ok\n")  # that this is answered at all is the answer

    async def readyz() -> _Answer:
        reason = status.unready_because()
        if reason:
            return _Answer(reason.encode() + b"\n", HTTPStatus.SERVICE_UNAVAILABLE)
        full = status.full()
        return _Answer(f"ok, but no worker takes a job: {full}\n".encode() if full else b"ok\n")

    async def document() -> _Answer:
        return _Answer(json.dumps(await status.fresh_document(), indent=2).encode(), type=JSON)

    metrics: Metrics | None = None

    async def scrape() -> _Answer:
        # Not above: prometheus_client is not needed before the first scrape, and the first worker would wait.
        from lastcall.supervisor.views import metrics as exposition

        nonlocal metrics
        metrics = metrics or exposition.Metrics(status)
        return _Answer(await metrics.text(), type=exposition.CONTENT_TYPE)

    return {"/livez": livez, "/readyz": readyz, "/status": document, "/metrics": scrape}
