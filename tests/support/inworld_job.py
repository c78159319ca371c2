"""A job as the broker sees one, a raw client of Inworld's protocol, and a program that runs many of them.

The program forks PROCESSES children. Each child opens one connection and speaks on STREAMS contexts at once,
TURNS times. The exit code is the number of children that failed. With `hang` a child only speaks, says so on
standard output, and waits to be killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any
from urllib.parse import urljoin

import aiohttp

CONFIG = {"voiceId": "Ashley", "modelId": "m", "audioConfig": {"sampleRateHertz": 24000}, "autoMode": True}
PATH = "/tts/v1/voice:streamBidirectional"


class Job:
    """One connection. `results` are by context id, in order; `errors` those of none."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self.token = token
        self.results: dict[str, list[dict[str, Any]]] = {}
        self.errors: list[dict[str, Any]] = []
        self.close_code: int | None = None
        self.ws: aiohttp.ClientWebSocketResponse
        self._session: aiohttp.ClientSession
        self._reading: asyncio.Task[None]
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Job:
        self._session = aiohttp.ClientSession()
        try:
            headers = {"Authorization": f"Basic {self.token}"}
            self.ws = await self._session.ws_connect(urljoin(self.url, PATH), headers=headers)
        except BaseException:
            await self._session.close()
            raise
        self._reading = asyncio.ensure_future(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.ws.close()
        self._reading.cancel()
        await asyncio.wait({self._reading})
        await self._session.close()

    async def _read(self) -> None:
        async for message in self.ws:
            frame = json.loads(message.data)
            result = frame.get("result")
            if result is None:
                self.errors.append(frame["error"])
            else:
                self.results.setdefault(result["contextId"], []).append(result)
            self._changed.set()
        self.close_code = self.ws.close_code
        self._changed.set()

    async def send(self, context: str | None, **payload: Any) -> None:
        frame = payload if context is None else {**payload, "contextId": context}
        await self.ws.send_str(json.dumps(frame))

    async def burst(self, context: str, text: str, *, close: bool = True) -> None:
        """Send a whole utterance before any answer, as the plugin does."""
        await self.send(context, create=CONFIG)
        await self.send(context, send_text={"text": text})
        await self.send(context, flush_context={})
        if close:
            await self.send(context, close_context={})

    async def said(self, context: str | None, what: str, timeout: float = 15.0) -> Any:
        """Wait until a context has been told this, and return it; `code` is an error's status."""
        async with asyncio.timeout(timeout):
            while True:
                for result in self.errors if context is None else self.results.get(context, []):
                    if what in result:
                        return result[what]
                    if what == "code" and result.get("status", {}).get("code"):
                        return result["status"]["code"]
                self._changed.clear()
                await self._changed.wait()

    def kinds(self, context: str) -> list[str]:
        """Return what a context has been told, in order, repeats left out."""
        kinds: list[str] = []
        for result in self.results.get(context, []):
            kind = next((key for key in result if key not in ("contextId", "status")), "error")
            if kinds[-1:] != [kind]:
                kinds.append(kind)
        return kinds


async def speak(url: str, token: str, streams: int, turns: int) -> None:
    async with Job(url, token) as job:
        for turn in range(turns):
            names = [f"c{turn}-{number}" for number in range(streams)]
            for name in names:
                await job.burst(name, "This is one of many sentences.")
            for name in names:
                await job.said(name, "contextClosed", 60.0)
                chunks = sum("audioChunk" in result for result in job.results[name])
                assert chunks == 20, f"{chunks} chunks of audio, expected 20"


async def hang(url: str, token: str, streams: int) -> None:
    async with Job(url, token) as job:
        for number in range(streams):
            await job.burst(f"c{number}", "On and on and on. " * 100, close=False)
            await job.said(f"c{number}", "audioChunk")
        print("speaking", flush=True)
        await asyncio.get_running_loop().create_future()


def main() -> None:
    url, token, processes, streams, turns = sys.argv[1:]
    if turns == "hang":
        asyncio.run(hang(url, token, int(streams)))
    children = []
    for _ in range(int(processes)):
        pid = os.fork()
        if pid == 0:
            asyncio.run(speak(url, token, int(streams), int(turns)))
            os._exit(0)
        children.append(pid)
    sys.exit(sum(os.waitpid(pid, 0)[1] != 0 for pid in children))


if __name__ == "__main__":
    main()
