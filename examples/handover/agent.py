"""An agent whose calls go on in another job: `lastcall run --workers 2 examples/handover/agent.py`.

`lastcall handover JOB` hands over one call, `lastcall reload --handover` all of them. The five lines that are
marked as added, and one that is changed, are all that it takes. docs/tutorial-handover.md tells what happens.
"""

from __future__ import annotations

import logging

from livekit.agents import Agent, AgentSession, JobContext, WorkerOptions, cli

import lastcall  # added

logger = logging.getLogger("agent")


class Assistant(Agent):  # type: ignore[misc]  # livekit-agents is not type-checked here
    """Greets each caller once."""

    def __init__(self) -> None:
        super().__init__(instructions="You are a friendly assistant.")

    async def on_enter(self) -> None:
        """Greet a caller whom no agent before has greeted."""
        if not lastcall.is_resumed(self):  # added
            await self.session.say("Hello, how can I help you?")


async def entrypoint(ctx: JobContext) -> None:
    """Talk until the caller hangs up, in this job or in another."""
    call = lastcall.call(ctx)  # added
    await ctx.connect()
    session: AgentSession[None] = AgentSession()  # here go your stt=, llm= and tts=
    resumption = lastcall.resume_session(call, session, agents=[Assistant])  # added
    await session.start(agent=resumption.agent, room=ctx.room)  # changed: was agent=Assistant()
    await resumption.take_over()  # added
    logger.info("the call goes on" if resumption.is_resumed else "the call has begun")


if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint))
