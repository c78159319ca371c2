"""An AgentSession from outside: its voice, the turn that it hears, and its tools while they run."""

from __future__ import annotations

import asyncio
from typing import Any

import livekit.agents

from lastcall.worker.job.call import Call

# From this version on a session tells of each tool that starts and ends.
TELLS_OF_TOOLS = hasattr(livekit.agents, "ToolExecutionUpdatedEvent")


class Voice:
    """The input and the output of a session, which another agent may have in its place.

    A closed session hears nothing and says nothing. `say` and `generate_reply` raise RuntimeError, as in a
    session that closes: a reply that nobody hears might call a tool a second time.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        # The switches that were on, and are to be on again.
        self._switches: list[Any] = []
        self._is_closed = False

    def close(self) -> None:
        """Close the input and the output."""
        self._close_input()
        self._close_output()

    async def fall_silent(self) -> None:
        """Close both, and end what is being said; what was said of it is in the history afterwards."""
        session = self._session
        self._close_input()
        await self._interrupt()
        self._close_output()
        if session.current_speech is not None:  # one that has begun meanwhile, of a turn before
            await self._interrupt()

    def open(self) -> None:
        """Open what was closed; nothing where nothing was."""
        if self._is_closed:
            self._is_closed = False
            del self._session.say, self._session.generate_reply
        while self._switches:
            self._switches.pop()(True)

    def _close_input(self) -> None:
        session = self._session
        if not self._is_closed:
            self._is_closed = True
            session.say = session.generate_reply = _refuse
        self._switch_off(session.input.audio_enabled, session.input.set_audio_enabled)
        if session.input.video is not None:
            self._switch_off(session.input.video_enabled, session.input.set_video_enabled)

    def _close_output(self) -> None:
        output = self._session.output
        self._switch_off(output.audio_enabled, output.set_audio_enabled)
        self._switch_off(output.transcription_enabled, output.set_transcription_enabled)

    def _switch_off(self, is_on: bool, switch: Any) -> None:
        if is_on:
            switch(False)
            self._switches.append(switch)

    async def _interrupt(self) -> None:
        try:
            self._session.clear_user_turn()
            await self._session.interrupt(force=True)
        except RuntimeError:  # the session is closed, and silent
            return


def _refuse(*_arguments: object, **_options: object) -> None:
    raise RuntimeError("the call is handed over, and another agent speaks")


class Heard:
    """The words of a turn that has not ended, as the STT has understood them."""

    def __init__(self, session: Any) -> None:
        self._final: list[str] = []
        self._rest = ""
        session.on("user_input_transcribed", self._on_transcript)
        session.on("conversation_item_added", self._on_item)

    @property
    def text(self) -> str:
        return " ".join(filter(None, (*self._final, self._rest)))

    def _on_transcript(self, event: Any) -> None:
        if event.is_final:
            self._final.append(event.transcript.strip())
            self._rest = ""
        else:
            self._rest = event.transcript.strip()

    def _on_item(self, event: Any) -> None:
        if getattr(event.item, "role", "") == "user":  # the turn is in the history now
            self._final, self._rest = [], ""


class Tools:
    """The tools of a session that run. The call is busy meanwhile, and is not handed over.

    A livekit-agents that does not tell of tools tells of replies only. There every reply of an agent with
    tools counts, from the request to the end of the speech.
    """

    def __init__(self, call: Call, session: Any) -> None:
        self._call = call
        self._session = session
        self._running: set[str] = set()
        self._ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        if TELLS_OF_TOOLS:
            session.on("tool_execution_updated", self._on_update)
        else:
            session.on("speech_created", self._on_speech)

    @property
    def is_running(self) -> bool:
        return bool(self._running)

    def _on_update(self, event: Any) -> None:
        update = event.update
        if update.type == "tool_call_started":
            self._begin(update.function_call.call_id)
        elif update.type == "tool_call_ended":
            self._end(update.call_id)

    def _on_speech(self, event: Any) -> None:
        handle = event.speech_handle
        tools = [*self._session.tools, *self._session.current_agent.tools]
        if event.source == "generate_reply" and tools:
            self._begin(handle.id)
            handle.add_done_callback(lambda _handle: self._end(handle.id))

    def _begin(self, id: str) -> None:
        if not self._running:
            self._ended = asyncio.Event()
            task = asyncio.get_running_loop().create_task(self._be_busy(self._ended))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._running.add(id)

    def _end(self, id: str) -> None:
        self._running.discard(id)
        if not self._running:
            self._ended.set()

    async def _be_busy(self, ended: asyncio.Event) -> None:
        async with self._call.busy():
            await ended.wait()
