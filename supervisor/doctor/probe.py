"""Asks the LiveKit server whether it would let a worker in, without becoming one.

The handshake is the worker's own: a WebSocket at /agent, with a token that carries the agent grant. The
connection is closed as soon as it stands; a connection that never registers is offered nothing. Then the
server is asked for the dispatches of a room that there is not. That needs the right by which a worker has a
successor dispatched (EnsureAdminPermission in pkg/service/auth.go of livekit-server), and changes nothing.

No other module of the supervisor's side imports livekit. Only the verb `doctor` loads this one, in a process
that supervises nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import aiohttp
from livekit import api

from lastcall.supervisor.doctor.facts import Answer
from lastcall.worker.base.proxies import PROXY_VARIABLES, proxy_of

# Seconds for everything. Ours: an operator waits that long for a report.
TIMEOUT = 8.0
# Seconds that a connection may take to close. Ours: short, because the answer is known by then.
CLOSE_TIMEOUT = 1.0
# Ours: the handshake takes TIMEOUT at most, the rest is for clocks that differ.
TOKEN_LIFETIME = timedelta(seconds=60)
# Seconds for the question whether the key may dispatch. The server refuses a token at once. With a right one
# it looks for the room, for seconds, and the answer to that says nothing. Ours: a round trip over a slow
# network.
REFUSES_WITHIN = 1.0
# A name that no room of a user has.
NO_ROOM = "lastcall-doctor-asks-for-its-rights"
VARIABLES = ("LIVEKIT_URL", "LIVEKIT_API_KEY", "LIVEKIT_API_SECRET")
SWITCHING_PROTOCOLS = 101


def ask(environment: Mapping[str, str]) -> Answer | None:
    """Return the server's answer; None when URL, key or secret are not given.

    A thread asks, and is left to itself when its time is over: a resolver that hangs can't be told to stop.
    """
    url, key, secret = (environment.get(name, "") for name in VARIABLES)
    if not (url and key and secret):
        return None
    shown = _shown(url)
    server = _server(url)
    if not server:
        return Answer(url=shown, error="no URL of a LiveKit server; expected wss://HOST")
    may_work = token(key, secret)
    may_dispatch = token(key, secret, api.VideoGrants(room_admin=True, room=NO_ROOM))
    proxy = proxy_of(environment)
    answers: list[Answer] = []

    def run() -> None:
        asyncio.run(_ask(server, may_work, may_dispatch, shown, answers, proxy))

    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(TIMEOUT)
    return answers[-1] if answers else Answer(url=shown, error=_late())


async def _ask(
    server: str, may_work: str, may_dispatch: str, shown: str, answers: list[Answer], proxy: str | None
) -> None:
    """Add the answer to the handshake, and then that answer with what else can be had of the server."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(timeout=timeout, proxy=proxy) as session:
        await _shake_hands(session, server, may_work, shown, answers)
        if answers[0].status == SWITCHING_PROTOCOLS:
            # The answer to an upgrade need not have a date. The first answer counts, whatever comes of this.
            with contextlib.suppress(OSError, ValueError, aiohttp.ClientError):
                async with session.get(server, allow_redirects=False) as response:
                    answers.append(replace(answers[-1], skew_s=_skew(response.headers)))
            with contextlib.suppress(OSError, ValueError, aiohttp.ClientError):
                status = await _dispatch_status(session, server, may_dispatch)
                answers.append(replace(answers[-1], dispatch_status=status))


async def _dispatch_status(session: aiohttp.ClientSession, server: str, bearer: str) -> int:
    """Return the status of the answer about dispatches of a room; 0 if there is none in time."""
    url = f"{server}/twirp/livekit.AgentDispatchService/ListDispatch"
    headers = {"Authorization": f"Bearer {bearer}"}
    with contextlib.suppress(TimeoutError):
        async with (
            asyncio.timeout(REFUSES_WITHIN),
            session.post(url, json={"room": NO_ROOM}, headers=headers, allow_redirects=False) as response,
        ):
            return response.status
    return 0


async def _shake_hands(
    session: aiohttp.ClientSession, server: str, bearer: str, shown: str, answers: list[Answer]
) -> None:
    try:
        async with session.ws_connect(
            f"{server}/agent",
            headers={"Authorization": f"Bearer {bearer}"},
            timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT),
        ):
            # Added before the close, because a server that is slow to close has answered all the same.
            answers.append(Answer(url=shown, status=SWITCHING_PROTOCOLS))
    except aiohttp.WSServerHandshakeError as error:
        if error.status == SWITCHING_PROTOCOLS:
            answer = Answer(url=shown, error="it upgrades the connection, but not to a WebSocket")
        else:
            answer = Answer(url=shown, status=error.status, skew_s=_skew(error.headers or {}))
        answers.append(answer)
    except aiohttp.ClientHttpProxyError as error:
        reason = f"the proxy of {' or '.join(PROXY_VARIABLES)} answers {error.status} {error.message}"
        answers.append(Answer(url=shown, error=_plain(reason)))
    except aiohttp.ClientProxyConnectionError as error:
        reason = f"the proxy of {' or '.join(PROXY_VARIABLES)} can't be reached: {_reason(error)}"
        answers.append(Answer(url=shown, error=_plain(reason)))
    except aiohttp.ClientResponseError as error:
        # aiohttp reports an answer that it can't parse as a status of 400 that no server sent.
        first = error.message.partition("\n")[0].rstrip(": ")
        answers.append(Answer(url=shown, error=_plain(f"what answers speaks no HTTP: {first}")))
    except TimeoutError:
        answers.append(Answer(url=shown, error=_late()))
    except (OSError, ValueError, aiohttp.ClientError) as error:
        answers.append(Answer(url=shown, error=_plain(_reason(error))))


def _late() -> str:
    return f"no answer within {TIMEOUT:g} s"


def token(key: str, secret: str, grants: api.VideoGrants | None = None) -> str:
    """Return a token with these grants; with the agent grant, as a worker's own, where none are given."""
    grants = api.VideoGrants(agent=True) if grants is None else grants
    with warnings.catch_warnings():
        # PyJWT warns of a short secret, on standard error; the secret of a development server is short.
        warnings.simplefilter("ignore")
        return str(api.AccessToken(key, secret).with_ttl(TOKEN_LIFETIME).with_grants(grants).to_jwt())


def _server(url: str) -> str:
    """Return scheme, host and path of a URL; empty for a URL that no LiveKit server can have."""
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("ws", "wss", "http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return ""
    authority = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{authority}{parts.path.rstrip('/')}" if is_url else ""


def _shown(url: str) -> str:
    """Return the URL without the parts that may be secret: user, password, query.

    A password may have any character in it that should have been escaped, so all in front of the last @ goes.
    """
    scheme, slashes, rest = url.partition("?")[0].partition("#")[0].rpartition("://")
    return _plain(f"{scheme}{slashes}{rest.rpartition('@')[2]}")


def _plain(text: str) -> str:
    """Replace characters that a terminal would take for more than text."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _reason(error: Exception) -> str:
    """Return the system's words for an error, in place of aiohttp's, which repeat host and port."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, OSError) and cause.errno:
        is_numbered_apart = isinstance(cause, ssl.SSLError | socket.gaierror)
        return str(cause.strerror or cause) if is_numbered_apart else os.strerror(cause.errno)
    return str(error) or type(error).__name__


def _skew(headers: Mapping[str, str]) -> float | None:
    """Return how far the server's clock is ahead of this machine's, in seconds."""
    try:
        return parsedate_to_datetime(headers["Date"]).timestamp() - time.time()
    except (KeyError, ValueError):
        return None
