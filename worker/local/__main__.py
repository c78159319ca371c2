"""`python -m lastcall.worker.local`: the local LiveKit server, with a stream of dispatches if wanted.

It prints one JSON line when it serves, {"url", "environment"}. It ends on SIGTERM, SIGINT, or the end of its
standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys

from lastcall.worker.local.livekit_server import DispatchServer, Event

# A newcomer may warm up for as long as a supervisor lets it; one that refuses is not asked in a tight loop.
GREETING_TIMEOUT = 120.0
GREETING_PAUSE = 0.1


async def serve(*, port: int, rate: float, seconds: float, greet: bool) -> None:
    """Serve, and dispatch `rate` jobs a second that last about `seconds` each, until told to end.

    `greet`: dispatch one job to each worker that registers.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if not os.isatty(0):
        loop.add_reader(0, lambda: stop.set() if not os.read(0, 1024) else None)
    newcomers: asyncio.Queue[Event] = asyncio.Queue(maxsize=100)

    def on_event(event: Event) -> None:
        if greet and event.kind == "registered" and not newcomers.full():
            newcomers.put_nowait(event)

    async with DispatchServer(port=port, on_event=on_event) as server, asyncio.TaskGroup() as group:
        print(json.dumps({"url": server.url, "environment": server.environment}), flush=True)
        dispatching = [group.create_task(dispatch_to_each(server, newcomers))]
        if rate > 0:
            dispatching.append(group.create_task(dispatch_stream(server, rate, seconds)))
        await stop.wait()
        for task in dispatching:
            task.cancel()


async def dispatch_to_each(server: DispatchServer, newcomers: asyncio.Queue[Event]) -> None:
    """Dispatch one job to each newcomer, under the agent name that it registered."""
    number = 0
    async with asyncio.TaskGroup() as group:
        while True:
            event = await newcomers.get()
            number += 1
            group.create_task(greet_one(server, event, f"call-{number}"))


async def greet_one(server: DispatchServer, newcomer: Event, room: str) -> None:
    """Dispatch until the newcomer takes the job: it may be on hold at first, until it is warm."""
    worker_id = newcomer.worker_id

    def is_ready() -> bool:
        peer = server.peers.get(worker_id)
        return peer is None or peer.available

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GREETING_TIMEOUT):
            while worker_id in server.peers:
                await server.until(is_ready, GREETING_TIMEOUT)
                done = await server.dispatch(
                    room, agent_name=str(newcomer.detail["agent_name"]), only=worker_id, caller="caller"
                )
                if done.outcome != "no_worker":
                    return
                await asyncio.sleep(GREETING_PAUSE)


async def dispatch_stream(server: DispatchServer, rate: float, seconds: float) -> None:
    """Dispatch for ever, once there is a worker that takes jobs."""
    number = 0
    async with asyncio.TaskGroup() as group:
        while True:
            if server.available():
                number += 1
                length = seconds * random.uniform(0.5, 1.5)
                group.create_task(server.dispatch(f"call-{number}", metadata=f"{length:.2f}"))
            await asyncio.sleep(1 / rate)


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(prog="python -m lastcall.worker.local", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--rate", type=float, default=0.0, help="dispatches a second; 0: none")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long a job lasts")
    parser.add_argument("--greet", action="store_true", help="dispatch one job to each new worker")
    arguments = parser.parse_args()
    try:
        asyncio.run(serve(**vars(arguments)))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
