"""The agent of the tutorial: it greets a caller and talks until the caller hangs up."""

from __future__ import annotations

from livekit.agents import Agent, AgentSession, JobContext, WorkerOptions, cli


async def entrypoint(ctx: JobContext) -> None:
    """Talk with one caller."""
    await ctx.connect()
    session: AgentSession[None] = AgentSession()  # here go your stt=, llm= and tts=
    await session.start(agent=Agent(instructions="You are a friendly assistant."), room=ctx.room)


if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint))
