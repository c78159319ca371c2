"""The demo's agent: a call lasts as long as its dispatch's metadata says, in seconds, and is spoken through.

It speaks Inworld's protocol through the machine's pool, as the plugin would; the plugin itself is not needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import time
from typing import Any
from urllib.parse import urljoin

import aiohttp
from livekit.agents import JobContext, WorkerOptions, cli

PATH = "/tts/v1/voice:streamBidirectional"
SENTENCES = (
    "Thank you for calling.",
    "Let me look that up for you.",
    "One moment, please.",
    "Is there anything else?",
)
PAUSE = 0.5


async def entrypoint(ctx: JobContext) -> None:
    """Hold a call for a while, as an agent does until its caller hangs up."""
    over_at = time.monotonic() + float(ctx.job.metadata or 3)
    url = os.environ.get("LASTCALL_INWORLD_WS_URL")
    if url:
        await speak(url, os.environ["LASTCALL_INWORLD_TOKEN"], over_at)
    await asyncio.sleep(max(0.0, over_at - time.monotonic()))
    ctx.shutdown(reason="caller hung up")


async def speak(url: str, token: str, over_at: float) -> None:
    """Say one sentence after the other until it is over; the one that was begun is heard to its end."""
    headers = {"Authorization": f"Basic {token}"}
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(urljoin(url, PATH), headers=headers) as ws,
    ):
        number = 0
        while time.monotonic() < over_at - PAUSE:
            context = secrets.token_hex(4)
            frames: tuple[dict[str, object], ...] = (
                {"create": {"voiceId": "Ashley", "modelId": "inworld-tts-1"}},
                {"send_text": {"text": SENTENCES[number % len(SENTENCES)], "flush_context": {}}},
                {"close_context": {}},
            )
            for frame in frames:
                await ws.send_json({"contextId": context, **frame})
            await until_closed(ws, context)
            await asyncio.sleep(PAUSE)
            number += 1


async def until_closed(ws: aiohttp.ClientWebSocketResponse, context: str) -> None:
    """Take in the audio of one context until the server has closed it, or the connection has gone."""
    async for message in ws:
        result: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            result = json.loads(message.data).get("result") or {}
        if result.get("contextId") == context and ("contextClosed" in result or _failed(result)):
            return


def _failed(result: dict[str, Any]) -> bool:
    return bool(result.get("status", {}).get("code", 0))


def no_load() -> float:
    """Return a load of 0. The server offers no job to a worker with a load of 1, as on a busy machine."""
    return 0.0


if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint, load_fnc=no_load, load_threshold=float("inf")))
