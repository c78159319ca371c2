"""An agent that speaks without a pause and can be handed over. Data of the caller says what it does.

The data is "hang up", "busy", "idle", "hand over" (the agent asks for a successor itself), "keep: " with
JSON, "keep while it is read", or the name of a state in `STATES`. The metadata is a JSON object, which
`request_fnc` reads strictly:

    keeps        what the agent gives to `call.keep`; without it a counter of turns
    holds        the successor waits before `take_over` until the file `JOB_LOG` with ".ready" exists,
                 or that with ".ready-ROOM"; with "join" it waits before it joins its room
    after        seconds of a shutdown callback
    ends         by the epoch of a successor, how its code ends: "raises before" the takeover, "raises" or
                 "shuts down" right after it, "raises later", when the old agent has left
    keeps_nothing   whether the agent calls no `keep`
    deletes      whether a shutdown callback deletes the room

As `python passes_on.py start`, with the variable LOCAL_ROOM, it is the agent of a worker without lastcall.
Its jobs join rooms of the local server. IDENTITY is that of its agents.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import time
from typing import Any

from calls import half_busy, note  # type: ignore[import-not-found]  # beside this file, as an agent's own modules are
from livekit import rtc
from livekit.agents import JobContext, JobExecutorType, JobProcess, JobRequest, WorkerOptions, cli

import lastcall

# Seconds of one frame.
FRAME = float(os.environ.get("FRAME", "0.02"))


# ParticipantKind of livekit's protocol.
AGENT_KIND = 4


class Voice:
    """Speaks, one frame after the other. Each frame is a turn of the call."""

    def __init__(self) -> None:
        self.source = rtc.AudioSource(48000, 1, queue_size_ms=40)
        self.speaking: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self.speaking = asyncio.create_task(self._speak())

    def stop(self) -> None:
        if self.speaking is not None:
            self.speaking.cancel()
        self.source.clear_queue()

    async def _speak(self) -> None:
        samples = int(48000 * FRAME)
        frame = rtc.AudioFrame(bytes(2 * samples), 48000, 1, samples)
        while True:
            await self.source.capture_frame(frame)


# States for `call.keep`, by name.
STATES: dict[str, Any] = {
    "too large": "x" * 300_000,
    "no JSON": {"x": b"x"},
    "a function that returns too much": lambda: "x" * 300_000,
    "a function that returns no JSON": lambda: {"x": b"x"},
    "a function that raises": lambda: json.loads("{}")["my card is 4111"],
}


async def unaware(ctx: JobContext) -> None:
    """Speak at once, as an agent of the same name that knows nothing of handovers."""
    try:
        await ctx.connect()
        note(ctx, "speaks")
    except Exception as error:
        note(ctx, "raised", error=type(error).__name__)
        raise


async def permitted(ctx: JobContext) -> None:
    ready = os.environ["JOB_LOG"] + ".ready"
    while not (os.path.exists(ready) or os.path.exists(f"{ready}-{ctx.job.room.name}")):
        await asyncio.sleep(0.02)


async def entrypoint(ctx: JobContext) -> None:
    if os.environ.get("UNAWARE"):
        await unaware(ctx)
        return
    spec = json.loads(ctx.job.metadata)
    call = lastcall.call(ctx)
    voice = Voice()
    wanted: asyncio.Queue[str] = asyncio.Queue()
    attributes = dict(ctx.job.attributes)
    note(ctx, "started", resumed=call.resumed is not None, attributes=attributes)

    @call.on_takeover
    async def be_silent() -> Any:
        note(ctx, "is to be silent")
        voice.stop()
        note(ctx, "silent")
        return {"bye": ctx.job.id}

    @call.on_take_back
    def speak_again() -> None:
        note(ctx, "speaks", again=True)
        voice.begin()

    @call.on_stopping
    def told(notice: lastcall.Notice) -> None:
        note(ctx, "told", reason=notice.reason)

    def keep(state: Any) -> None:
        try:
            call.keep(state)
        except (TypeError, ValueError) as error:
            note(ctx, "refused", error=type(error).__name__)
        else:
            note(ctx, "kept")

    async def older() -> str:
        call.keep("newer")
        await asyncio.sleep(0)
        return "older"

    async def after() -> None:
        if spec.get("deletes"):
            await ctx.delete_room()
        await asyncio.sleep(spec.get("after", 0))
        note(ctx, "stored")

    ctx.add_shutdown_callback(after)
    ctx.room.on("data_received", lambda packet: wanted.put_nowait(packet.data.decode()))
    ctx.room.on("disconnected", lambda reason: note(ctx, "disconnected", reason=int(reason)))
    if os.environ.get("LOCAL_ROOM"):  # without lastcall an entrypoint that goes on has 15 s
        ctx.room.on("disconnected", lambda _reason: wanted.put_nowait("hang up"))
    resumed = call.resumed
    if resumed is not None and spec.get("holds") == "join":
        await permitted(ctx)
    await ctx.connect()
    track = rtc.LocalAudioTrack.create_audio_track("voice", voice.source)
    await ctx.room.local_participant.publish_track(track)
    note(ctx, "connected", identity=ctx.room.local_participant.identity)
    if not spec.get("keeps_nothing"):
        call.keep(spec.get("keeps", {"job": ctx.job.id}))
    end = "" if resumed is None else spec.get("ends", {}).get(str(resumed.epoch), "")
    if end == "raises before":
        raise RuntimeError(end)
    if resumed is not None and spec.get("holds"):
        await permitted(ctx)
    turns = await call.take_over()
    if end == "raises":
        note(ctx, end)
        raise RuntimeError(end)
    if end == "shuts down":
        note(ctx, end)
        ctx.shutdown(reason=end)
        await asyncio.sleep(600)
    note(
        ctx,
        "speaks",
        turns=turns,
        state=None if resumed is None else resumed.state,
        epoch=0 if resumed is None else resumed.epoch,
        reason="" if resumed is None else resumed.reason,
        metadata=None if resumed is None else resumed.metadata,
    )
    voice.begin()
    if end == "raises later":
        while any(each.kind == AGENT_KIND for each in ctx.room.remote_participants.values()):
            await asyncio.sleep(0.02)
        note(ctx, end)
        raise RuntimeError(end)
    async with contextlib.AsyncExitStack() as stack:
        while (what := await wanted.get()) != "hang up":
            if what == "busy":
                await stack.enter_async_context(call.busy())
            elif what == "idle":
                await stack.aclose()
            elif what == "hand over":
                note(ctx, "answered", result=await call.hand_over("memory"))
            elif what.startswith("keep: "):
                keep(json.loads(what.removeprefix("keep: ")))
            elif what in STATES or what == "keep while it is read":
                keep(STATES.get(what, older))
            note(ctx, what.partition(":")[0])
    note(ctx, "ended")
    ctx.shutdown(reason="done")


async def request(offer: JobRequest) -> None:
    json.loads(offer.job.metadata)
    line = {
        "job": offer.job.id,
        "what": "asked",
        "at": time.monotonic(),
        "attributes": dict(offer.job.attributes),
        "digest": hashlib.sha256(offer.job.metadata.encode()).hexdigest(),
        "agent_name": offer.job.agent_name,
    }
    with open(os.environ["JOB_LOG"], "a") as file:
        file.write(json.dumps(line) + "\n")
    await offer.accept(identity=os.environ.get("IDENTITY", "bot"))


def prewarm(_process: JobProcess) -> None:
    if os.environ.get("LOCAL_ROOM"):
        from lastcall.worker.local import room

        room.install()


if __name__ == "__main__":
    cli.run_app(
        WorkerOptions(
            entrypoint_fnc=entrypoint,
            request_fnc=request,
            prewarm_fnc=prewarm,
            port=0,
            load_fnc=half_busy,
            load_threshold=float("inf"),
            num_idle_processes=int(os.environ.get("IDLE", "1")),
            agent_name=os.environ.get("AGENT_NAME", ""),
            job_executor_type=JobExecutorType[os.environ.get("EXECUTOR", "PROCESS")],
        )
    )
