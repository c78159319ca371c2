"""The WebSocket handshake with Inworld, and what each way to fail means."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Literal
from urllib.parse import urljoin

import aiohttp

from lastcall.worker.inworld.pool.protocol import MAX_FRAME

PATH = "/tts/v1/voice:streamBidirectional"
USER_AGENT = "lastcall"

# refused: 429, the account has too many connections; another time it may have fewer. key: 401 or 403.
Failure = Literal["refused", "key", "failed"]


class DialError(Exception):
    """Raised when there is no connection; the text says why, in one line."""

    def __init__(self, message: str, failure: Failure) -> None:
        super().__init__(message)
        self.failure: Failure = failure


async def dial(
    session: aiohttp.ClientSession, url: str, key: str, *, patience: float, goodbye: float
) -> aiohttp.ClientWebSocketResponse:
    """Return a connected WebSocket. Raises DialError, within `patience` seconds."""
    try:
        async with asyncio.timeout(patience):
            return await session.ws_connect(
                urljoin(url, PATH),
                headers={"Authorization": f"Basic {key}", "X-User-Agent": USER_AGENT},
                max_msg_size=MAX_FRAME,
                timeout=aiohttp.ClientWSTimeout(ws_close=goodbye),
            )
    except TimeoutError as error:
        raise DialError(f"no handshake within {patience:g} s", "failed") from error
    except aiohttp.WSServerHandshakeError as error:
        if error.status == HTTPStatus.TOO_MANY_REQUESTS:
            raise DialError("429: the account has no connection left", "refused") from error
        if error.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise DialError(f"{error.status}: the server refuses the API key", "key") from error
        raise DialError(f"the handshake was answered with {error.status}", "failed") from error
    except (aiohttp.ClientError, OSError) as error:
        raise DialError(str(error) or type(error).__name__, "failed") from error
