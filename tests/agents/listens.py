"""An agent with the plugins of OpenAI and Silero: each job has Silero look for voice in a second of silence.

A job notes whether the model has answered.
"""

from __future__ import annotations

import json
import os

from livekit import rtc
from livekit.agents import JobContext, JobProcess, WorkerOptions, cli, vad
from livekit.plugins import openai, silero

RATE, FRAMES = 16_000, 100


def prewarm(process: JobProcess) -> None:
    process.userdata["vad"] = silero.VAD.load()
    process.userdata["llm"] = openai.LLM(api_key="none")


async def entrypoint(ctx: JobContext) -> None:
    stream = ctx.proc.userdata["vad"].stream()
    for _ in range(FRAMES):
        stream.push_frame(rtc.AudioFrame.create(RATE, 1, RATE // FRAMES))
    stream.end_input()
    heard = {event.type async for event in stream}
    line = {"job": ctx.job.id, "what": "ended", "pid": os.getpid()}
    line |= {"silence": heard == {vad.VADEventType.INFERENCE_DONE}, "model": ctx.proc.userdata["llm"].model}
    with open(os.environ["JOB_LOG"], "a") as file:
        file.write(json.dumps(line) + "\n")
    ctx.shutdown()


if __name__ == "__main__":
    cli.run_app(WorkerOptions(entrypoint_fnc=entrypoint, prewarm_fnc=prewarm))
