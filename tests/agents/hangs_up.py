"""An agent whose jobs handle SIGTERM themselves and shut the call down: cut all the same, politely."""

import asyncio
import signal

from livekit.agents import AgentServer, JobContext, cli

server = AgentServer(num_idle_processes=2, load_threshold=float("inf"))


@server.rtc_session()  # type: ignore[untyped-decorator]
async def entrypoint(ctx: JobContext) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ctx.shutdown, "told to")
    await asyncio.Event().wait()


if __name__ == "__main__":
    cli.run_app(server)
