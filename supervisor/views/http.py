"""HTTP for probes and scrapes: /livez, /readyz, /status, /metrics."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from lastcall.supervisor.config.user_files import words_of
from lastcall.supervisor.errors import ConfigError
from lastcall.supervisor.views.metrics import CONTENT_TYPE, Metrics
from lastcall.supervisor.views.status import Status

# Seconds between two tries to get a port that another program has. Ours: such a program is about to end, or
# will not end.
RETRY_EVERY = 1.0
# Seconds that one try may take. Ours: only the look for the name of a host takes any, and workers start after
# the first try.
RESOLVE_WITHIN = 2.0
# The reasons for another try, and the log events of each.
BUSY, UNRESOLVED = "busy", "not resolved"
WAITS = {BUSY: "http port is busy", UNRESOLVED: "http host is not resolved"}
OVER = {BUSY: "http port is free now", UNRESOLVED: "http host is resolved now"}


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
    runner = web.AppRunner(_app(status), access_log=None, handle_signals=False, shutdown_timeout=0.2)
    await runner.setup()
    waiting: asyncio.Task[None] | None = None
    try:
        try:
            site = web.TCPSite(runner, host.strip("[]"), int(port))
            wait = await _try(site)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"http: {address} can't be used: {words_of(error)};"
                " give another HOST:PORT by --http, or --http off"
            ) from error
        if wait:
            log.warning(WAITS[wait], http=address, tried_again_every_s=RETRY_EVERY)
            waiting = asyncio.create_task(_try_again(site, wait, address, log))
        yield f"{address} ({wait})" if wait else f"{host}:{runner.addresses[0][1]}"
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait({waiting})
        await runner.cleanup()


async def _try(site: web.TCPSite) -> str:
    """Begin to listen; return why another try is needed, or nothing. Raises OSError for any other reason."""
    try:
        async with asyncio.timeout(RESOLVE_WITHIN):
            await site.start()
    except OSError as error:
        await site.stop()  # else it could not be started again
        if error.errno == errno.EADDRINUSE:
            return BUSY
        # At boot the name server may come later than lastcall.
        is_early = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        if is_early or isinstance(error, TimeoutError):
            return UNRESOLVED
        raise
    return ""


async def _try_again(site: web.TCPSite, wait: str, address: str, log: Any) -> None:
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


def _app(status: Status) -> web.Application:
    metrics = Metrics(status)

    async def livez(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")  # that this is answered at all is the answer

    async def readyz(_: web.Request) -> web.Response:
        reason = status.unready_because()
        if reason:
            return web.Response(status=503, text=reason + "\n")
        full = status.full()
        return web.Response(text=f"ok, but no worker takes a job: {full}\n" if full else "ok\n")

    async def document(_: web.Request) -> web.Response:
        return web.json_response(status.document(), dumps=lambda value: json.dumps(value, indent=2))

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=await metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.add_routes(
        [
            web.get("/livez", livez),
            web.get("/readyz", readyz),
            web.get("/status", document),
            web.get("/metrics", scrape),
        ]
    )
    return app
