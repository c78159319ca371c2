"""Requests of the worker to the LiveKit server about rooms, over Twirp.

A token needs `roomAdmin` and the name of the room (EnsureAdminPermission in pkg/service/auth.go).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import re
from collections.abc import Mapping
from typing import Any

import aiohttp
from livekit import api

from lastcall.worker.base.proxies import proxy_to

# Seconds for one request. Ours: a server answers within 20 ms, and another region within half a second.
ANSWERS_WITHIN = 3.0
# Seconds that a token is valid. Ours: more than any request takes, and little for a clock that is wrong.
TOKEN_SECONDS = 60


class RoomServiceError(Exception):
    """Raised when the server can't be asked, or says no; the text has the method and the reason."""


class RoomService:
    """Asks the server of `url` with a key. `environ` says the proxy, as for the worker's connection."""

    def __init__(self, url: str, key: str, secret: str, environ: Mapping[str, str]) -> None:
        self._url = re.sub("^ws", "http", url).rstrip("/")
        self._key = key
        self._secret = secret
        self._proxy = proxy_to(url, environ)

    async def remove(self, room: str, identity: str, sid: str) -> bool:
        """Remove a participant whose session is still `sid`; tell whether it was there.

        Raises RoomServiceError. A participant of the same identity that has joined since is left alone.
        """
        wanted = {"room": room, "identity": identity}
        try:
            found = await self._post("RoomService/GetParticipant", room, wanted)
            if found.get("sid") != sid:
                return False
            await self._post("RoomService/RemoveParticipant", room, wanted)
        except RoomServiceError as error:
            if "not_found" in str(error):
                return False
            raise
        return True

    async def has_agent(self, room: str, agent_name: str) -> bool:
        """Tell whether an agent of this name is in a room. Raises RoomServiceError.

        The server itself writes the name into the agent's attributes (pkg/agent/worker.go, AssignJob).
        """
        found = await self._post("RoomService/ListParticipants", room, {"room": room})
        return any(
            each.get("kind") == "AGENT" and each.get("attributes", {}).get("lk.agent_name", "") == agent_name
            for each in found.get("participants", ())
        )

    async def create_dispatch(self, room: str, agent_name: str, metadata: str) -> None:
        """Have the server look for a worker for a room. Raises RoomServiceError."""
        body = {"room": room, "agent_name": agent_name, "metadata": metadata}
        await self._post("AgentDispatchService/CreateDispatch", room, body)

    async def _post(self, method: str, room: str, body: dict[str, Any]) -> dict[str, Any]:
        grants = api.VideoGrants(room_admin=True, room=room)
        headers = {"Authorization": f"Bearer {self._token(grants)}"}
        url = f"{self._url}/twirp/livekit.{method}"
        try:
            async with (
                asyncio.timeout(ANSWERS_WITHIN),
                aiohttp.ClientSession() as session,
                session.post(url, json=body, headers=headers, proxy=self._proxy) as answer,
            ):
                document: dict[str, Any] = {}
                with contextlib.suppress(ValueError, aiohttp.ContentTypeError):
                    document = await answer.json()
                if answer.status != 200:
                    raise RoomServiceError(f"{method}: {answer.status} {document.get('code', '')}")
                return document
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise RoomServiceError(f"{method}: {error!r}") from error

    def _token(self, grants: api.VideoGrants) -> str:
        token = api.AccessToken(self._key, self._secret).with_grants(grants)
        text: str = token.with_ttl(datetime.timedelta(seconds=TOKEN_SECONDS)).to_jwt()
        return text
