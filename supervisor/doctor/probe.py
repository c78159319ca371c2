"""Asks the LiveKit server whether it would let a worker in, without becoming one.

The handshake is the worker's own: GET /agent with an Upgrade and a token that carries the agent grant. An
answer of 101 is hung up on; a connection that never registers is offered nothing.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from lastcall.supervisor.doctor.facts import Answer

TIMEOUT = 8.0
VALID = 60
# RFC 6455, section 1.3.
GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
NAMES = ("LIVEKIT_URL", "LIVEKIT_API_KEY", "LIVEKIT_API_SECRET")


def ask(environment: Mapping[str, str]) -> Answer | None:
    """Return the server's answer; None when URL, key or secret are not given.

    In a thread that is left to itself when its time is over: a resolver that hangs can't be told to stop, and
    neither can a server that sends a byte a second.
    """
    url, key, secret = (environment.get(name, "") for name in NAMES)
    if not (url and key and secret):
        return None
    answers: list[Answer] = []

    def ask_twice() -> None:
        answers.append(_ask(url, key, secret))
        if answers[0].status == 101 and answers[0].skew_s is None:
            # The answer to an upgrade need not have a date. Whatever becomes of this one, the first counts.
            with contextlib.suppress(OSError, http.client.HTTPException):
                _, headers = _get(url, "/", {})
                answers.append(replace(answers[0], skew_s=_skew(headers["Date"])))

    asking = threading.Thread(target=ask_twice, daemon=True)
    asking.start()
    asking.join(TIMEOUT)
    return answers[-1] if answers else Answer(url=_shown(url), error=f"no answer within {TIMEOUT:g} s")


def _ask(url: str, key: str, secret: str) -> Answer:
    shown = _shown(url)
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss", "http", "https") or not parts.hostname:
            return Answer(url=shown, error="no URL of a LiveKit server; expected wss://HOST")
        nonce = base64.b64encode(secrets.token_bytes(16)).decode()
        path = parts.path.rstrip("/") + "/agent"
        status, answer = _get(url, path, _headers(key, secret, nonce))
        if status == 101 and answer["Sec-WebSocket-Accept"] != _accepted(nonce):
            return Answer(url=shown, error="it upgrades the connection, but not to a WebSocket")
        return Answer(url=shown, status=status, skew_s=_skew(answer["Date"]))
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(url=shown, error=_plain(str(error) or type(error).__name__))


def _get(url: str, path: str, headers: dict[str, str]) -> tuple[int, Message]:
    parts = urlsplit(url)
    make: Any = http.client.HTTPConnection
    if parts.scheme in ("wss", "https"):
        make = http.client.HTTPSConnection
    connection = make(parts.hostname or "", parts.port, timeout=TIMEOUT)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers
    finally:
        connection.close()


def _headers(key: str, secret: str, nonce: str) -> dict[str, str]:
    return {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": nonce,
        "Authorization": f"Bearer {token(key, secret, time.time())}",
    }


def _accepted(nonce: str) -> str:
    return base64.b64encode(hashlib.sha1((nonce + GUID).encode()).digest()).decode()


def _shown(url: str) -> str:
    """Return the URL without what may be secret in it: user, password, query."""
    bare = url.partition("?")[0].partition("#")[0]
    scheme, slashes, rest = bare.rpartition("://")
    authority, slash, path = rest.partition("/")
    return _plain(f"{scheme}{slashes}{authority.rpartition('@')[2]}{slash}{path}")


def _plain(text: str) -> str:
    """Replace what a terminal would take for more than text."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def token(key: str, secret: str, now: float) -> str:
    """Return a JWT with the agent grant; HS256, as LiveKit's own."""
    claims = {"iss": key, "nbf": int(now) - 5, "exp": int(now) + VALID, "video": {"agent": True}}
    head, body = (_encoded(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    signature = hmac.new(secret.encode(), f"{head}.{body}".encode(), hashlib.sha256).digest()
    return f"{head}.{body}.{_encoded(signature)}"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _skew(date: str | None) -> float | None:
    if not date:
        return None
    try:
        return parsedate_to_datetime(date).timestamp() - time.time()
    except ValueError:
        return None
