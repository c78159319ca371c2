"""Asks the LiveKit server whether it would let a worker in, without becoming one.

The handshake is the worker's own: GET /agent with an Upgrade and a token that carries the agent grant. An
answer of 101 is hung up on; a connection that never registers is offered nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import secrets
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from .facts import Answer

TIMEOUT = 8.0
VALID = 60
NAMES = ("LIVEKIT_URL", "LIVEKIT_API_KEY", "LIVEKIT_API_SECRET")


def ask(environment: Mapping[str, str]) -> Answer | None:
    """Return the server's answer; None when URL, key or secret are not given."""
    url, key, secret = (environment.get(name, "") for name in NAMES)
    if not (url and key and secret):
        return None
    parts = urlsplit(url)
    if parts.scheme not in ("ws", "wss", "http", "https") or not parts.hostname:
        return Answer(url=url, error="no URL of a LiveKit server; expected wss://HOST")
    is_tls = parts.scheme in ("wss", "https")
    try:
        make = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
        connection = make(parts.hostname, parts.port, timeout=TIMEOUT)
        try:
            connection.request("GET", parts.path.rstrip("/") + "/agent", headers=_headers(key, secret))
            answer = connection.getresponse()
            return Answer(url=url, status=answer.status, skew_s=_skew(answer.getheader("Date")))
        finally:
            connection.close()
    except (OSError, ssl.SSLError, http.client.HTTPException, ValueError) as error:
        return Answer(url=url, error=str(error) or type(error).__name__)


def _headers(key: str, secret: str) -> dict[str, str]:
    return {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(secrets.token_bytes(16)).decode(),
        "Authorization": f"Bearer {token(key, secret, time.time())}",
    }


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
