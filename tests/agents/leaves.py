"""An agent whose job processes end by themselves in the middle of a call, with exit code 0."""

import asyncio
import os

from livekit.agents import AgentServer, JobContext, cli

server = AgentServer(num_idle_processes=2, load_threshold=float("inf"))


@server.rtc_session()  # type: ignore[untyped-decorator]
async def entrypoint(ctx: JobContext) -> None:
    await asyncio.sleep(1.5)
    os._exit(0)


if __name__ == "__main__":
    cli.run_app(server)
