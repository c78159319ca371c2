"""HTTP for probes and scrapes: /livez, /readyz, /status, /metrics."""

from __future__ import annotations

import asyncio
import errno
import json
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


@asynccontextmanager
async def serve(address: str, status: Status, log: Any) -> AsyncIterator[str]:
    """Serve on HOST:PORT for as long as the block runs; "off" serves nothing.

    Yields the address in use, with "(busy)" behind it while another program has the port. A busy port is
    tried again while the block runs, because calls need no HTTP. Raises ConfigError for an address that can't
    be had at all.
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
            listens = await _listens(site)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"http: {address} can't be used: {words_of(error)};"
                " give another HOST:PORT by --http, or --http off"
            ) from error
        if not listens:
            log.warning("http port is busy", http=address, tried_again_every_s=RETRY_EVERY)
            waiting = asyncio.create_task(_wait_for_port(site, address, log))
        yield f"{host}:{runner.addresses[0][1]}" if listens else f"{address} (busy)"
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait({waiting})
        await runner.cleanup()


async def _listens(site: web.TCPSite) -> bool:
    """Begin to listen; False where another program has the port. Raises OSError for any other reason."""
    try:
        await site.start()
    except OSError as error:
        await site.stop()  # else it could not be started again
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


async def _wait_for_port(site: web.TCPSite, address: str, log: Any) -> None:
    try:
        while True:
            await asyncio.sleep(RETRY_EVERY)
            if await _listens(site):
                break
    except OSError as error:
        log.error("http port can't be had", http=address, reason=words_of(error))
    else:
        log.info("http port is free now", http=address)


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
