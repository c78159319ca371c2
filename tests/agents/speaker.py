"""An agent that speaks with the unmodified Inworld plugin. Each dispatch's metadata says how its job goes.

The metadata is a JSON object. Each key may be left out:

    mode         "say", "leave" or "stay", see below
    streams      how many streams the job speaks at once
    text         the text of each stream
    until        the file for which "leave" waits, which has to be there in that mode
    tts          where the job's TTS was made: "module", "setup" or "job"
    arguments    the arguments of a TTS that the job makes
    raises       whether the job's shutdown callback raises
say     speak to the end, then end the job
leave   speak, and end the job in mid-speech once the file is there, nothing closed
stay    return from the entrypoint and go on speaking until the job is told to end
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from calls import note  # type: ignore[import-not-found]  # beside this file, as an agent's own modules are
from livekit.agents import JobContext, JobExecutorType, JobProcess, WorkerOptions, cli

import lastcall

IMPORT_LATE = "IMPORT_LATE" in os.environ


def make(**arguments: Any) -> Any:
    """Make a TTS with nothing but what an agent passes; SPEAKER_WS is for where there is no broker."""
    from livekit.plugins import inworld

    url = os.environ.get("SPEAKER_WS")
    arguments |= {"ws_url": url} if url else {}
    # Of the encodings of the local server, one that the installed plugin can decode: older ones know no PCM.
    encoding = "LINEAR16" if inworld.__version__.startswith(("1.3.", "1.4.")) else "PCM"
    return inworld.TTS(encoding=encoding, sample_rate=24000, **arguments)


tts = None if IMPORT_LATE else make()


def setup(process: JobProcess) -> None:
    if not IMPORT_LATE:
        process.userdata["tts"] = make()


async def listen(stream: Any, ctx: JobContext) -> None:
    frames = 0
    async for _ in stream:
        frames += 1
        if frames == 1:
            note(ctx, "heard")
    note(ctx, "silent", frames=frames)


class Extra:
    """Something that the agent has lastcall close."""

    def __init__(self, ctx: JobContext) -> None:
        self.ctx = ctx

    async def aclose(self) -> None:
        note(self.ctx, "extra closed")


async def entrypoint(ctx: JobContext) -> None:
    spec = json.loads(ctx.job.metadata or "{}")
    mode = spec.get("mode", "say")
    own = functools.partial(make, **spec.get("arguments", {}))
    here: dict[str, Callable[[], Any]] = {
        "module": lambda: tts,
        "setup": lambda: ctx.proc.userdata["tts"],
        "job": own,
    }
    speaker = here[spec.get("tts", "job")]()
    note(ctx, "started", ws_url=speaker._ws_url, key=os.environ.get("INWORLD_API_KEY"))
    lastcall.closing(ctx, Extra(ctx))

    async def callback() -> None:
        note(ctx, "callback")
        if spec.get("raises"):
            raise RuntimeError("as asked")

    ctx.add_shutdown_callback(callback)
    streams = [speaker.stream() for _ in range(spec.get("streams", 1))]
    for stream in streams:
        stream.push_text(spec.get("text", "Hello, this is a sentence that is spoken."))
        stream.end_input()
    listening = [asyncio.create_task(listen(stream, ctx)) for stream in streams]
    ctx.proc.userdata["listening"] = (streams, listening)
    if mode == "say":
        await asyncio.gather(*listening)
    elif mode == "stay":
        return
    else:
        while not Path(spec["until"]).exists():
            await asyncio.sleep(0.02)
    note(ctx, "ended")
    ctx.shutdown(reason="done")


if __name__ == "__main__":
    cli.run_app(
        WorkerOptions(
            entrypoint_fnc=entrypoint,
            prewarm_fnc=setup,
            load_threshold=float("inf"),
            num_idle_processes=1,
            job_executor_type=JobExecutorType[os.environ.get("EXECUTOR", "PROCESS")],
        )
    )
