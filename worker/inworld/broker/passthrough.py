"""Inworld's plain HTTP calls, passed on with the real key in the place of the token.

Bodies stream through as they come; nothing is parsed. The call of a client that goes away is cancelled, and a
client that reads slowly slows the server down, because nothing is buffered between them.
"""

from __future__ import annotations

import logging
from urllib.parse import urljoin

import aiohttp
from aiohttp import web

from lastcall.worker.inworld.pool.dialling import USER_AGENT
from lastcall.worker.inworld.pool.errors import UNAVAILABLE

log = logging.getLogger("lastcall.inworld")

# Headers that are passed on to Inworld, and from Inworld to the client.
REQUEST_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "X-Request-Id", "X-User-Agent")
RESPONSE_HEADERS = ("Content-Encoding", "Content-Type", "Retry-After", "X-Request-Id")
# To connect, and between any two bytes. Ours: as one WebSocket handshake, and well above a long synthesis.
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=60.0)


class PassThrough:
    """Passes requests on to one base URL; use as an async context manager."""

    def __init__(self, base_url: str, proxy: str | None = None) -> None:
        self.base_url = base_url
        self._proxy = proxy
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> PassThrough:
        self._session = aiohttp.ClientSession(timeout=TIMEOUT, auto_decompress=False, proxy=self._proxy)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def __call__(self, request: web.Request, key: str) -> web.StreamResponse:
        """Return the server's answer, already sent; 502 or 504 when there is none."""
        headers = {name: request.headers[name] for name in REQUEST_HEADERS if name in request.headers}
        headers.setdefault("X-User-Agent", USER_AGENT)
        url = urljoin(self.base_url, request.path)
        # The token may be in the query, where the key may be as well; it is not for the server.
        query = [(name, value) for name, value in request.query.items() if name != "authorization"]
        response: web.StreamResponse | None = None
        try:
            async with self._session.request(
                request.method,
                url,
                params=query,
                headers={**headers, "Authorization": f"Basic {key}"},
                data=await request.read() or None,
            ) as answer:
                given = {name: answer.headers[name] for name in RESPONSE_HEADERS if name in answer.headers}
                response = web.StreamResponse(status=answer.status, headers=given)
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
                return response
        except (TimeoutError, aiohttp.ClientError) as error:
            log.warning("an HTTP call failed", extra={"path": request.path, "error": type(error).__name__})
            if response is not None:
                raise  # cuts the connection, so that the client does not take half an answer for a whole one
            status = 504 if isinstance(error, TimeoutError) else 502
            why = str(error) or type(error).__name__
            if isinstance(error, aiohttp.ClientHttpProxyError):  # its text has the proxy's password
                why = f"the proxy answers {error.status}"
            text = f"no answer from {self.base_url}: {why}"
            return web.json_response({"code": UNAVAILABLE, "message": text, "details": []}, status=status)
