"""`python -m worker.local`: the local dispatch server, with a stream of dispatches if wanted.

It prints one JSON line when it serves, {"url", "environment"}, then one line per dispatch that found no
worker; it ends on SIGTERM, SIGINT, or the end of its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys

from .dispatch import DispatchServer


async def serve(*, port: int, rate: float, seconds: float) -> None:
    """Serve, and dispatch `rate` jobs a second that last about `seconds` each, until told to end."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if not os.isatty(0):
        loop.add_reader(0, lambda: stop.set() if not os.read(0, 1024) else None)
    async with DispatchServer(port=port) as server, asyncio.TaskGroup() as group:
        print(json.dumps({"url": server.url, "environment": server.environment}), flush=True)
        dispatching = group.create_task(dispatch_stream(server, rate, seconds)) if rate > 0 else None
        await stop.wait()
        if dispatching is not None:
            dispatching.cancel()


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
    parser = argparse.ArgumentParser(prog="python -m worker.local", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--rate", type=float, default=0.0, help="dispatches a second; 0: none")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long a job lasts")
    arguments = parser.parse_args()
    try:
        asyncio.run(serve(port=arguments.port, rate=arguments.rate, seconds=arguments.seconds))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
