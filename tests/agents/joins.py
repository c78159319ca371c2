"""An agent that joins its room. Data of the caller says what the agent does there.

The data is "reconnect", "leave" (the room, and go on), "hang up" (which ends the job) or "delete" (the room).
The metadata is a JSON object:

    after    seconds that a shutdown callback takes
    joins    whether the agent joins at all
"""

from __future__ import annotations

import asyncio
import json

from calls import half_busy, note  # type: ignore[import-not-found]  # beside this file, as an agent's own modules are
from livekit import rtc
from livekit.agents import JobContext, WorkerOptions, cli

import lastcall

FULL_RECONNECT = 7


class Database:
    def __init__(self, ctx: JobContext) -> None:
        self.ctx = ctx

    async def aclose(self) -> None:
        note(self.ctx, "closed")


async def entrypoint(ctx: JobContext) -> None:
    spec = json.loads(ctx.job.metadata or "{}")
    lastcall.closing(ctx, Database(ctx))

    async def after(reason: str = "") -> None:
        note(ctx, "callback")
        await asyncio.sleep(spec.get("after", 0))
        note(ctx, "stored")

    ctx.add_shutdown_callback(after)
    wanted: asyncio.Queue[str] = asyncio.Queue()
    ctx.room.on("data_received", lambda packet: wanted.put_nowait(packet.data.decode()))
    ctx.room.on("disconnected", lambda reason: note(ctx, "disconnected", reason=int(reason)))
    ctx.room.on("reconnected", lambda: note(ctx, "reconnected"))
    if not spec.get("joins", True):
        note(ctx, "waits")
        await asyncio.sleep(600)
    await ctx.connect()
    caller = await ctx.wait_for_participant()
    source = rtc.AudioSource(48000, 1)
    track = rtc.LocalAudioTrack.create_audio_track("voice", source)
    await ctx.room.local_participant.publish_track(track)
    note(ctx, "joined", caller=caller.identity)
    talking = asyncio.create_task(talk(source))
    try:
        while True:
            match await wanted.get():
                case "reconnect":
                    await ctx.room.simulate_scenario(FULL_RECONNECT)
                case "delete":
                    await ctx.delete_room()
                case "leave":
                    await ctx.room.disconnect()
                case "hang up":
                    break
    except asyncio.CancelledError:
        note(ctx, "cancelled")
        raise
    finally:
        talking.cancel()
    note(ctx, "ended")
    ctx.shutdown(reason="done")


async def talk(source: rtc.AudioSource) -> None:
    """Speak without a pause."""
    frame = rtc.AudioFrame(bytes(9600), 48000, 1, 4800)
    while True:
        await source.capture_frame(frame)


if __name__ == "__main__":
    options = WorkerOptions(
        entrypoint_fnc=entrypoint,
        load_fnc=half_busy,
        load_threshold=float("inf"),
        num_idle_processes=1,
    )
    cli.run_app(options)
