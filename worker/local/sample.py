"""The demo's agent: a job lasts as long as its dispatch's metadata says, in seconds, then ends by itself."""

from __future__ import annotations

import asyncio

from livekit.agents import JobContext, WorkerOptions, cli


async def entrypoint(ctx: JobContext) -> None:
    """Hold a call for a while, as an agent does until its caller hangs up."""
    await asyncio.sleep(float(ctx.job.metadata or 3))
    ctx.shutdown(reason="caller hung up")


if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint, load_threshold=float("inf")))
