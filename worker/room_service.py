"""Requests of the worker to the LiveKit server about rooms, over Twirp.

A token needs `roomAdmin` and the name of the room (EnsureAdminPermission in pkg/service/auth.go).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import re
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from livekit import api

from lastcall.worker.base.proxies import proxy_to

log = logging.getLogger("lastcall.worker")

# Seconds for one request. Ours: a server answers within 20 ms, and another region within half a second.
ANSWERS_WITHIN = 3.0
# Seconds that a token is valid. Ours: more than any request takes, and little for a clock that is wrong.
TOKEN_SECONDS = 60
# The attribute in which the server shows the name of an agent (pkg/agent/worker.go, AssignJob).
AGENT_NAME = "lk.agent_name"
# Kinds of participants that keep no room open (pkg/rtc/participant.go, IsDependent).
DEPENDENT = frozenset({"AGENT", "EGRESS"})


class RoomServiceError(Exception):
    """Raised when the server can't be asked, or says no; the text has the method and the reason.

    `status` is that of the HTTP answer, 0 where there was none.
    """

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Participant:
    """One participant of a room. `keeps_open`: the room stays for it, as for a caller.

    The server itself writes the name of an agent into its attributes (`AGENT_NAME`).
    `attributes`: those of a handover are in `base.succession`.
    """

    identity: str
    keeps_open: bool
    is_agent: bool
    agent_name: str
    sid: str = field(default="", compare=False)
    attributes: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """A dispatch of a room. `agents`: the identities of those that have taken it, once the server knows."""

    id: str
    agent_name: str
    agents: tuple[str, ...] = ()


class Requests:
    """Requests to the LiveKit server that run beside everything else. They can't end the worker.

    While `is_closing` none begins.
    """

    def __init__(self) -> None:
        self.is_closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, request: Coroutine[Any, Any, None]) -> None:
        """Run a request, unless the worker closes."""
        if self.is_closing:
            request.close()
            return
        task = asyncio.get_running_loop().create_task(self._run(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self, within: float) -> None:
        """Give the requests a moment, in seconds, and cancel the others."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within)
        for task in self._tasks:
            task.cancel()

    async def _run(self, request: Coroutine[Any, Any, None]) -> None:
        try:
            await request
        except Exception:  # whatever the server answers, the calls of this worker go on
            log.exception("a request to the LiveKit server has failed")


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

    async def participants(self, room: str) -> list[Participant]:
        """Return the participants of a room, avatars of agents left out; none if there is no such room.

        Raises RoomServiceError. A field that has its default value may be missing in the answer.
        """
        found = await self._post("RoomService/ListParticipants", room, {"room": room})
        people = []
        for each in found.get("participants") or ():
            kind, attributes = each.get("kind", "STANDARD"), each.get("attributes") or {}
            if each.get("state") != "DISCONNECTED" and "lk.publish_on_behalf" not in attributes:
                person = Participant(
                    identity=each.get("identity", ""),
                    keeps_open=kind not in DEPENDENT,
                    is_agent=kind == "AGENT",
                    agent_name=attributes.get(AGENT_NAME, ""),
                    sid=each.get("sid", ""),
                    attributes=attributes,
                )
                people.append(person)
        return people

    async def create_dispatch(
        self,
        room: str,
        agent_name: str,
        metadata: str,
        deployment: str,
        attributes: Mapping[str, str],
        *,
        restarts: bool = True,
    ) -> str:
        """Have the server look for a worker for a room, and return the id. Raises RoomServiceError.

        `restarts`: whether the server may dispatch a job anew that has failed, as LiveKit Cloud does.
        """
        body: dict[str, Any] = {"room": room, "agent_name": agent_name, "metadata": metadata}
        if deployment:
            body["deployment"] = deployment
        if not restarts:
            body["restart_policy"] = "JRP_NEVER"
        body["attributes"] = dict(attributes)
        made = await self._post("AgentDispatchService/CreateDispatch", room, body)
        return str(made.get("id", ""))

    async def dispatches(self, room: str) -> list[Dispatch]:
        """Return the dispatches of a room. Raises RoomServiceError.

        The server names the agent 0.2 s after the dispatch, and 5 s after it where a worker has registered
        since the dispatch before (CheckEnabled in pkg/rtc/agentclient.go).
        """
        found = await self._post("AgentDispatchService/ListDispatch", room, {"room": room})
        made = []
        for each in found.get("agent_dispatches") or ():
            jobs = (each.get("state") or {}).get("jobs") or ()
            agents = [(job.get("state") or {}).get("participant_identity", "") for job in jobs]
            dispatch = Dispatch(
                id=each.get("id", ""),
                agent_name=each.get("agent_name", ""),
                agents=tuple(agent for agent in agents if agent),
            )
            made.append(dispatch)
        return made

    async def delete_dispatch(self, room: str, dispatch_id: str) -> None:
        """Have the server end a dispatch and its jobs. Raises RoomServiceError."""
        wanted = {"room": room, "dispatch_id": dispatch_id}
        await self._post("AgentDispatchService/DeleteDispatch", room, wanted)

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
                document: Any = None
                with contextlib.suppress(ValueError, aiohttp.ContentTypeError):
                    document = await answer.json()
                is_object = isinstance(document, dict)
                if answer.status != 200:
                    code = document.get("code", "") if is_object else ""
                    raise RoomServiceError(f"{method}: {answer.status} {code}", answer.status)
                if not is_object:
                    raise RoomServiceError(f"{method}: 200 without a JSON object")
                return dict(document)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise RoomServiceError(f"{method}: {_reason(error)}") from None

    def _token(self, grants: api.VideoGrants) -> str:
        token = api.AccessToken(self._key, self._secret).with_grants(grants)
        text: str = token.with_ttl(datetime.timedelta(seconds=TOKEN_SECONDS)).to_jwt()
        return text


def _reason(error: Exception) -> str:
    """Return what an error is. The text of one of aiohttp's may have the password of a proxy."""
    detail = getattr(error, "status", None) or getattr(getattr(error, "os_error", error), "strerror", None)
    return f"{type(error).__name__} {detail or ''}".strip()
