"""An agent that can't bear a stop: its jobs install a handler for SIGTERM that ends the process."""

from __future__ import annotations

import os
import signal

from livekit.agents import JobContext, WorkerOptions, cli


async def entrypoint(ctx: JobContext) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    raise RuntimeError("no such room")


if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint, load_threshold=float("inf"), num_idle_processes=1))
