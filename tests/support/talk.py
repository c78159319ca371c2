"""An AgentSession without keys: an LLM and a voice that follow rules, and a loudspeaker that is a clock."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

from livekit import rtc
from livekit.agents import DEFAULT_API_CONNECT_OPTIONS, AgentSession, io, llm, tts

from lastcall.worker.local.room_server import Visitor

RATE = 24000


class Parrot(llm.LLM):  # type: ignore[misc]  # livekit-agents is not type-checked
    """Answers "answer N to TEXT", where N counts the turns of the caller that the LLM was shown.

    A turn "book TEXT" calls the tool `book` with `what`, and a turn "pass on" calls `pass_on`. `asked` has
    the texts of the last request.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.requests = 0

    def chat(self, *, chat_ctx: Any, tools: Any = None, conn_options: Any = None, **_options: Any) -> Answer:
        """Answer the last turn."""
        self.requests += 1
        self.asked = [item.text_content or "" for item in chat_ctx.items if item.type == "message"]
        options = conn_options or DEFAULT_API_CONNECT_OPTIONS
        return Answer(self, chat_ctx=chat_ctx, tools=tools or [], conn_options=options)


class Answer(llm.LLMStream):  # type: ignore[misc]  # livekit-agents is not type-checked
    """One answer."""

    async def _run(self) -> None:
        items = self._chat_ctx.items
        said = [each.text_content for each in items if each.type == "message" and each.role == "user"]
        text = said[-1] if said else "nothing"
        has_run = any(each.type == "function_call_output" for each in items[-2:])
        name = {"book": "book", "pass": "pass_on"}.get(text.split()[0])
        if name is not None and not has_run:
            arguments = {"what": text.partition(" ")[2]} if name == "book" else {}
            call = llm.FunctionToolCall(name=name, arguments=json.dumps(arguments), call_id=f"c{len(items)}")
            delta = llm.ChoiceDelta(role="assistant", tool_calls=[call])
        else:
            delta = llm.ChoiceDelta(role="assistant", content=f"answer {len(said)} to {text}")
        self._event_ch.send_nowait(llm.ChatChunk(id="chunk", delta=delta))


class Voice(tts.TTS):  # type: ignore[misc]  # livekit-agents is not type-checked
    """Speaks each text as silence of so many seconds."""

    def __init__(self, seconds: float = 0.1) -> None:
        capabilities = tts.TTSCapabilities(streaming=False)
        super().__init__(capabilities=capabilities, sample_rate=RATE, num_channels=1)
        self.seconds = seconds
        self.texts: list[str] = []

    def synthesize(self, text: str, *, conn_options: Any = DEFAULT_API_CONNECT_OPTIONS) -> Silence:
        """Speak a text."""
        self.texts.append(text)
        return Silence(tts=self, input_text=text, conn_options=conn_options)


class Silence(tts.ChunkedStream):  # type: ignore[misc]  # livekit-agents is not type-checked
    """The silence of one text."""

    async def _run(self, output: Any) -> None:
        output.initialize(request_id="r", sample_rate=RATE, num_channels=1, mime_type="audio/pcm")
        output.push(bytes(2 * int(RATE * self._tts.seconds)))
        output.flush()


class Loudspeaker(io.AudioOutput):  # type: ignore[misc]  # livekit-agents is not type-checked
    """Plays in real time what it is given, and counts the seconds."""

    def __init__(self) -> None:
        super().__init__(label="test", capabilities=io.AudioOutputCapabilities(pause=False), sample_rate=RATE)
        self.frames = 0
        self._queued = 0.0
        self._started: float | None = None
        self._playing: asyncio.TimerHandle | None = None

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        """Take a frame."""
        await super().capture_frame(frame)
        self.frames += 1
        if self._started is None:
            self._started = asyncio.get_running_loop().time()
        self._queued += frame.duration

    def flush(self) -> None:
        """End a speech: it is over once it has been played."""
        super().flush()
        if self._started is not None:
            loop = asyncio.get_running_loop()
            left = max(0.0, self._started + self._queued - loop.time())
            self._playing = loop.call_later(left, self._over, False)

    def clear_buffer(self) -> None:
        """Stop at once."""
        if self._started is not None:
            self._over(True)

    def _over(self, interrupted: bool) -> None:
        if self._playing is not None:
            self._playing.cancel()
        if self._started is None:
            return
        played = min(self._queued, asyncio.get_running_loop().time() - self._started)
        self._queued, self._started, self._playing = 0.0, None, None
        self.on_playback_finished(playback_position=played, interrupted=interrupted)


def talking(**options: Any) -> AgentSession:
    """Return a session with a parrot, and without what would load a model."""
    return AgentSession(llm=options.pop("llm", None) or Parrot(), vad=None, **options)


def type_to_agents(visitor: Visitor, text: str) -> None:
    """Have a visitor of a local room send a text to the agents."""
    id = f"typed {len(visitor.heard)} {text}"
    head = {
        "kind": "text",
        "stream_id": id,
        "mime_type": "text/plain",
        "topic": "lk.chat",
        "timestamp": 0,
        "size": None,
        "attributes": {},
    }
    for what in ({"head": head}, {"part": base64.b64encode(text.encode()).decode()}, {"end": True}):
        visitor.say(do="relay", to=[], what={"do": "stream", "stream": id, **what})


def read_by(visitor: Visitor) -> list[tuple[str, str]]:
    """Return the texts that the agents of a local room have shown to a visitor, each with its agent."""
    texts: dict[str, str] = {}
    agents: dict[str, str] = {}
    for each in visitor.heard:
        what = each.get("what", {})
        if each["on"] != "relay" or what.get("do") != "stream":
            continue
        id = what["stream"]
        if what.get("head", {}).get("topic") == "lk.transcription":
            agents[id], texts[id] = each["from"], ""
        elif "part" in what and id in texts:
            texts[id] += base64.b64decode(what["part"]).decode()
    return [(agents[id], text.strip()) for id, text in texts.items() if text]
