"""HTTP for probes and scrapes: /livez, /readyz, /status, /metrics."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from lastcall.supervisor.config.user_files import words_of
from lastcall.supervisor.errors import ConfigError
from lastcall.supervisor.views.metrics import CONTENT_TYPE, Metrics
from lastcall.supervisor.views.status import Status


@asynccontextmanager
async def serve(address: str, status: Status) -> AsyncIterator[str]:
    """Serve on HOST:PORT for as long as the block runs; "off" serves nothing.

    Yields the address in use. Raises ConfigError when it is taken or does not exist.
    """
    if address == "off":
        yield address
        return
    host, _, port = address.rpartition(":")
    runner = web.AppRunner(_app(status), access_log=None, handle_signals=False, shutdown_timeout=0.2)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host.strip("[]"), int(port)).start()
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"http: {address} can't be used: {words_of(error)};"
                " give another HOST:PORT by --http, or --http off"
            ) from error
        yield f"{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


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
