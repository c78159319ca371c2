"""Every name of lastcall's public API, used as an agent uses it. mypy has to accept it; nothing runs it."""

from __future__ import annotations

from typing import Any, Literal, assert_type

from livekit.agents import Agent, AgentSession, JobContext
from livekit.plugins import inworld as plugin

import lastcall
from lastcall import Call, Notice, Resumed, Resumption, Withdrawn, call, closing, inworld, resume_session

assert_type(lastcall.__version__, str)


class Database:
    """Has an `aclose` without a result."""

    async def aclose(self) -> None:
        """Close."""


class Client:
    """Has an `aclose` with a result, as some clients do, and one with a default argument."""

    async def aclose(self, timeout: float = 1.0) -> bool:
        """Close."""
        return timeout > 0


class File:
    """Can't be closed by `closing`: has a `close` only."""

    def close(self) -> None:
        """Close."""


async def entrypoint(ctx: JobContext) -> None:
    """`closing` returns the very type that it was given."""
    assert_type(lastcall.closing(ctx, Database()), Database)
    client = closing(ctx, Client())
    assert_type(client, Client)
    assert_type(await client.aclose(), bool)
    closing(ctx, File())  # type: ignore[type-var]  # this is the error that a user has to see


async def goodbye(ctx: JobContext) -> None:
    """A call is awaited, asked and listened to; the functions keep their types."""
    this = call(ctx)
    assert_type(this, Call)
    assert_type(lastcall.call(ctx).is_inert, bool)

    @this.on_stopping
    async def later(notice: Notice) -> None:
        """Take the notice."""
        assert_type(notice.reason, Literal["stop", "reload", "recycle", "stall", "handover"])
        assert_type((notice.deadline, notice.seconds_left, notice.is_first), tuple[float, float, bool])

    @this.on_stopping
    def plain(notice: lastcall.Notice) -> bool:
        """Take the notice."""
        return notice.is_first

    assert_type(plain(await this.stopping), bool)
    assert_type(await this.stopping, Notice)
    assert_type(await this.stopping.wait(), Notice)
    assert_type(this.stopping.is_set(), bool)
    assert_type(this.stopping.notice, Notice | None)
    assert_type(await this.extend(10), float | None)
    this.on_stopping(File())  # type: ignore[type-var]  # this is the error that a user has to see


async def handover(ctx: JobContext) -> None:
    """A call keeps its state, leaves, and goes on."""
    this = call(ctx)
    this.keep({"turns": ["hello"]})
    this.keep(lambda: [1, 2])

    @this.on_takeover
    async def be_silent() -> list[str]:
        """Return the last turns."""
        return ["bye"]

    @this.on_take_back
    def speak_again() -> None:
        """Speak."""

    assert_type(await be_silent(), list[str])
    if this.resumed is not None:
        assert_type(this.resumed, Resumed)
        assert_type((this.resumed.epoch, this.resumed.reason), tuple[int, str])
        assert_type((this.resumed.metadata, this.resumed.attributes), tuple[str, dict[str, str]])
        assert_type(this.resumed.state, Any)
    try:
        assert_type(await this.take_over(), Any)
    except Withdrawn:
        return
    async with this.busy():
        assert_type(await this.hand_over("memory"), Literal["done", "refused", "failed"])
    this.on_takeover(File())  # type: ignore[type-var]  # this is the error that a user has to see


async def resumed(ctx: JobContext, session: AgentSession) -> None:
    """A session goes on."""
    agent = Agent(instructions="Be kind.")
    resumption = resume_session(
        call(ctx),
        session,
        agents=[agent, Agent],
        dump_userdata=lambda userdata: {"user": str(userdata)},
        load_userdata=lambda state: state["user"],
    )
    assert_type(resumption, Resumption)
    assert_type(await resumption.take_over(), bool)
    assert_type((resumption.is_resumed, resumption.has_left), tuple[bool, bool])
    assert_type(lastcall.is_resumed(agent), bool)


class Speaker(lastcall.inworld.TTS):
    """The class can be subclassed."""


def speech() -> plugin.TTS:
    """`inworld.TTS` is a class, takes the plugin's arguments, and stands where the plugin's is expected."""
    kind: type[inworld.TTS] = lastcall.inworld.TTS
    options: dict[str, Any] = {"encoding": "LINEAR16"}  # Any: arguments of several types
    tts = kind(voice="Ashley", **options)
    assert_type(tts, inworld.TTS)
    return tts
