"""`python -m lastcall.worker.local.driven`: the local LiveKit server, driven line by line from outside.

    out   {"url": …, "environment": {…}}                        first, when it serves
    out   {"at", "kind", "worker_id", "job_id", "detail"}       each event, as it happens
    in    {"reconnect": true}                                   have every agent reconnect from the start
    in    {"room": …, "agent_name": …}                          dispatch a job, with a caller in its room

It ends with its standard input, so that it can't outlive the program that drives it.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict

from lastcall.worker.local.livekit_server import DispatchServer, Event

MAX_LINE = 64 * 1024


def _print(event: Event) -> None:
    print(json.dumps(asdict(event), default=str), flush=True)


async def drive() -> None:
    """Serve until the end of standard input."""
    lines: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1000)
    rest = b""

    def read() -> None:
        nonlocal rest
        data = os.read(0, MAX_LINE)
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            if not lines.full():
                lines.put_nowait(line)
        if not data:
            loop.remove_reader(0)
            while lines.full():
                lines.get_nowait()
            lines.put_nowait(None)

    loop = asyncio.get_running_loop()
    loop.add_reader(0, read)
    async with DispatchServer(on_event=_print) as server, asyncio.TaskGroup() as group:
        print(json.dumps({"url": server.url, "environment": server.environment}), flush=True)
        dispatching = []
        while (line := await lines.get()) is not None:
            command = json.loads(line)
            if "reconnect" in command:
                server.rooms.reconnect_agents()
                continue
            dispatch = server.dispatch(
                str(command["room"]), agent_name=str(command["agent_name"]), caller="caller"
            )
            dispatching.append(group.create_task(dispatch))
        for task in dispatching:
            task.cancel()


if __name__ == "__main__":
    asyncio.run(drive())
