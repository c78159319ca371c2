"""An agent that dials out, and whose calls go on in another job: `lastcall run examples/outbound/agent.py`.

The metadata of the dispatch is the number. A job that goes on with a call does not dial: the callee is in its
room. `lk dispatch create --new-room --agent-name caller --metadata +4930123456` begins a call.
"""

from __future__ import annotations

import logging
import os

from livekit import api
from livekit.agents import Agent, AgentSession, JobContext, WorkerOptions, cli

import lastcall

logger = logging.getLogger("agent")


class Reminder(Agent):  # type: ignore[misc]  # livekit-agents is not type-checked here
    """Reminds of an appointment."""

    def __init__(self) -> None:
        super().__init__(instructions="You remind of an appointment, and move it if you are asked to.")


async def dial(ctx: JobContext, number: str) -> None:
    """Call a number into the room, and return when it was answered."""
    logger.info("dials")
    await ctx.api.sip.create_sip_participant(
        api.CreateSIPParticipantRequest(
            room_name=ctx.room.name,
            sip_trunk_id=os.environ["SIP_TRUNK"],
            sip_call_to=number,
            participant_identity="callee",
            wait_until_answered=True,
        )
    )


async def entrypoint(ctx: JobContext) -> None:
    """Dial, and talk until the callee hangs up, in this job or in another."""
    call = lastcall.call(ctx)
    await ctx.connect()
    session: AgentSession[None] = AgentSession()  # here go your stt=, llm= and tts=
    resumption = lastcall.resume_session(call, session, agents=[Reminder])
    await session.start(agent=resumption.agent, room=ctx.room)
    if call.resumed is None:
        async with call.busy():  # no handover while it rings
            await dial(ctx, ctx.job.metadata)
        session.say("Hello! This is a reminder of your appointment tomorrow.")
    await resumption.take_over()
    logger.info("the call goes on" if resumption.is_resumed else "the call has begun")


if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint, agent_name="caller"))
