"""An agent that ends its calls in time when its worker stops: `lastcall run examples/goodbye/agent.py`.

No caller is cut off in the middle of a sentence. When a minute of the call is left, the agent says good-bye,
offers to call back, and ends the call. Under `python agent.py start` no time is limited, and calls go on.
"""

from __future__ import annotations

import asyncio
import logging

from livekit.agents import Agent, AgentSession, JobContext, WorkerOptions, cli

import lastcall

logger = logging.getLogger("agent")

# Seconds before the deadline at which the agent takes leave: enough for some sentences and an answer.
LAST_MINUTE = 60.0
GOODBYE = "I am sorry, I have to go in a moment. I will call you back in five minutes. Good-bye!"


async def entrypoint(ctx: JobContext) -> None:
    """Talk until the caller hangs up, or the time is over."""
    session: AgentSession[None] = AgentSession()  # here go your stt=, llm= and tts=
    call = lastcall.call(ctx)

    @call.on_stopping
    async def leave_in_time(notice: lastcall.Notice) -> None:
        if not notice.is_first:  # only the deadline has moved, and the first call of this function sees that
            return
        logger.info("the time is limited", extra={"reason": notice.reason})
        while notice.seconds_left > LAST_MINUTE:
            await asyncio.sleep(min(1.0, notice.seconds_left - LAST_MINUTE))
            notice = await call.stopping  # the newest one
        logger.info("good-bye", extra={"reason": notice.reason})
        try:
            if session.tts is None:
                logger.warning("without a tts= nothing is said")
            else:
                await session.say(GOODBYE, allow_interruptions=False)
        finally:  # the call ends too if the sentence can't be said, as in an outage of the TTS
            ctx.shutdown(reason="good-bye")

    await session.start(agent=Agent(instructions="You are a friendly assistant."), room=ctx.room)
    await ctx.connect()
    logger.info("the call has begun")


if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint))
