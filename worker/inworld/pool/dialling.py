"""The WebSocket handshake with Inworld, and what each way to fail means."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Literal
from urllib.parse import urljoin

import aiohttp

from lastcall.worker.inworld.pool.protocol import MAX_FRAME

# Inworld's documentation of the text-to-speech WebSocket.
PATH = "/tts/v1/voice:streamBidirectional"
# X-User-Agent, which livekit-plugins-inworld sends from 1.4.3 on.
USER_AGENT = "lastcall"

# A 429 is refused: the account has no connection left for now. A 401 or a 403 is key. All else is failed.
Failure = Literal["refused", "key", "failed"]


class DialError(Exception):
    """Raised when there is no connection; the text says why, in one line."""

    def __init__(self, message: str, failure: Failure) -> None:
        super().__init__(message)
        self.failure: Failure = failure


async def dial(
    session: aiohttp.ClientSession, url: str, key: str, *, timeout: float, close_timeout: float
) -> aiohttp.ClientWebSocketResponse:
    """Return a connected WebSocket. Raises DialError, within `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            return await session.ws_connect(
                urljoin(url, PATH),
                headers={"Authorization": f"Basic {key}", "X-User-Agent": USER_AGENT},
                max_msg_size=MAX_FRAME,
                autoping=False,  # aiohttp would hide the pongs, and answer pings beside the writer
                timeout=aiohttp.ClientWSTimeout(ws_close=close_timeout),
            )
    except TimeoutError as error:
        raise DialError(f"no handshake within {timeout:g} s", "failed") from error
    except aiohttp.WSServerHandshakeError as error:
        if error.status == HTTPStatus.TOO_MANY_REQUESTS:
            raise DialError("429: the account has no connection left", "refused") from error
        if error.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise DialError(f"{error.status}: the server refuses the API key", "key") from error
        raise DialError(f"the handshake was answered with {error.status}", "failed") from error
    except aiohttp.ClientHttpProxyError as error:  # its text has the URL of the proxy, with the password
        raise DialError(f"the proxy answers {error.status}", "failed") from error
    except (aiohttp.ClientError, OSError) as error:
        raise DialError(str(error) or type(error).__name__, "failed") from error
