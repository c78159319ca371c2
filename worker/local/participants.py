"""The participants of a room of `room`: attributes, tracks, data, RPC and streams, by livekit's names.

RPC and streams are messages that clients relay to each other, as with a real server. The limits are those of
livekit's clients, which have been measured.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import inspect
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from livekit import rtc

Send = Callable[..., None]
Message = dict[str, Any]

# Bytes of the payload of a call and of its answer: livekit's clients refuse more.
MAX_RPC = 15360
# Seconds until the other side says that it has the call, and until it answers: livekit's clients.
RPC_ACK_WITHIN = 7.0
RPC_ANSWER_WITHIN = 10.0
# livekit's clients take the time for the acknowledgement off the response's time, and leave a second: with 3
# and with 8 the measured time was 1.0 s.
RPC_ANSWER_AT_LEAST = 1.0
# Bytes of one part of a stream: livekit's clients send as much in one packet.
CHUNK = 15000
# As `rtc.ParticipantState` has them; livekit 1.0.23, of livekit-agents 1.3.12, has no such name.
ACTIVE, DISCONNECTED = 2, 3
Code = rtc.RpcError.ErrorCode


@dataclass
class StreamInfo:
    """The head of a stream."""

    stream_id: str
    mime_type: str
    topic: str
    timestamp: int
    size: int | None
    attributes: dict[str, str] | None
    name: str = ""


class StreamReader:
    """The parts of a stream as they arrive: bytes, or text."""

    def __init__(self, info: StreamInfo, *, is_text: bool) -> None:
        self.info = info
        self._is_text = is_text
        self._parts: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        part = await self._parts.get()
        if isinstance(part, Exception):
            raise part
        if part is None:
            raise StopAsyncIteration
        return part.decode() if self._is_text else part

    async def read_all(self) -> str:
        """Return the whole text."""
        return "".join([part async for part in self])

    def feed(self, part: bytes | Exception | None) -> None:
        """Take what has arrived; None is the end."""
        self._parts.put_nowait(part)

    def close(self) -> None:
        """Read no more."""

    async def aclose(self) -> None:
        """Read no more."""


class StreamWriter:
    """Send a stream part by part."""

    def __init__(
        self, participant: LocalParticipant, info: StreamInfo, to: list[str], *, is_text: bool
    ) -> None:
        self.info = info
        self._participant = participant
        self._to = to
        self._kind = "text" if is_text else "bytes"
        head = {"kind": self._kind, **vars(info)}
        self._send(stream=info.stream_id, head=head)

    async def write(self, data: bytes | str) -> None:
        """Send one part."""
        content = data.encode() if isinstance(data, str) else bytes(data)
        for at in range(0, len(content), CHUNK):
            part = content[at : at + CHUNK]
            self._send(stream=self.info.stream_id, part=base64.b64encode(part).decode())
            await asyncio.sleep(0)

    async def aclose(self, *, reason: str = "", attributes: dict[str, str] | None = None) -> None:
        """End the stream."""
        self._send(stream=self.info.stream_id, end=reason)

    def _send(self, **what: Any) -> None:
        self._participant.relay(self._to, {"do": "stream", **what})


@dataclass(eq=False)
class Publication:
    """A published track."""

    sid: str
    name: str
    track: Any = None
    muted: bool = False
    kind: int = rtc.TrackKind.KIND_AUDIO
    source: int = rtc.TrackSource.SOURCE_MICROPHONE
    subscribed: bool = True
    mime_type: str = "audio/opus"
    audio_features: list[int] = field(default_factory=list)

    async def wait_for_subscription(self) -> None:
        """Return once somebody is subscribed: in a local room at once."""

    def set_subscribed(self, subscribed: bool) -> None:
        """Subscribe, or no longer."""
        self.subscribed = subscribed


class Participant:
    """A participant, as the server shows it."""

    def __init__(self, shown: Message) -> None:
        self.track_publications: dict[str, Publication] = {}
        self.disconnect_reason: int | None = None
        self.state = ACTIVE
        self.take(shown)

    def take(self, shown: Message) -> None:
        """Have the values that the server shows."""
        self.sid: str = shown["sid"]
        self.identity: str = shown["identity"]
        self.name: str = shown["name"]
        self.metadata: str = shown["metadata"]
        self.attributes: dict[str, str] = dict(shown["attributes"])
        self.kind: int = shown["kind"]
        self.can_publish: bool = shown["can_publish"]


class RemoteParticipant(Participant):
    """Another participant."""


class LocalParticipant(Participant):
    """The participant that the client itself is. `send` writes to the server."""

    def __init__(self, shown: Message, send: Send) -> None:
        super().__init__(shown)
        self._send = send
        self._rpc_handlers: dict[str, Callable[..., Any]] = {}
        self._calls: dict[str, asyncio.Future[Message]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._published: asyncio.Queue[str] = asyncio.Queue()
        self._publishing = asyncio.Lock()

    # -- itself ---------------------------------------------------------------------------------------

    async def set_attributes(self, attributes: dict[str, str]) -> None:
        """Change attributes; an empty value deletes one."""
        self._send(do="update", attributes=attributes)

    async def set_metadata(self, metadata: str) -> None:
        """Change the metadata."""
        self._send(do="update", metadata=metadata)

    async def set_name(self, name: str) -> None:
        """Change the name."""
        self._send(do="update", name=name)

    async def publish_track(self, track: Any, options: Any = None) -> Publication:
        """Publish a track of `ticks`, or any other without sound."""
        async with self._publishing:
            self._send(do="publish", name=getattr(track, "name", ""))
            sid = await self._published.get()
        if not sid:
            raise rtc.participant.PublishTrackError("the participant may not publish")
        publication = Publication(sid=sid, name=getattr(track, "name", ""), track=track)
        self.track_publications[sid] = publication
        self._attach(publication)
        return publication

    async def unpublish_track(self, track_sid: str) -> None:
        """Take a track back."""
        publication = self.track_publications.pop(track_sid)
        if hasattr(publication.track, "attach"):
            publication.track.attach("", None)
        self._send(do="unpublish", sid=track_sid)

    async def republish(self) -> None:
        """Publish every track anew, as a client does in a full reconnect."""
        publications = list(self.track_publications.values())
        self.track_publications.clear()
        for publication in publications:
            async with self._publishing:
                self._send(do="publish", name=publication.name)
                publication.sid = await self._published.get()
            if publication.sid:
                self.track_publications[publication.sid] = publication
                self._attach(publication)

    def _attach(self, publication: Publication) -> None:
        track = publication.track
        if hasattr(track, "attach"):
            track.attach(
                publication.sid,
                lambda n, seconds: self._send(do="tick", sid=publication.sid, n=n, seconds=seconds),
            )

    # -- data and streams -----------------------------------------------------------------------------

    def relay(self, to: list[str], what: Message) -> None:
        """Have the server hand a message to others; to all where none is named."""
        self._send(do="relay", to=to, what=what)

    async def publish_data(
        self,
        payload: bytes | str,
        *,
        reliable: bool = True,
        destination_identities: list[str] | None = None,
        topic: str = "",
    ) -> None:
        """Send one packet."""
        content = payload.encode() if isinstance(payload, str) else bytes(payload)
        data = base64.b64encode(content).decode()
        self.relay(destination_identities or [], {"do": "data", "data": data, "topic": topic})

    async def publish_transcription(self, transcription: Any) -> None:
        """Accept a transcription. Nobody in a local room shows one."""

    async def publish_dtmf(self, *, code: int, digit: str) -> None:
        """Accept a tone. Nobody in a local room hears one."""

    async def stream_bytes(
        self,
        name: str,
        *,
        total_size: int | None = None,
        mime_type: str = "application/octet-stream",
        attributes: dict[str, str] | None = None,
        stream_id: str | None = None,
        destination_identities: list[str] | None = None,
        topic: str = "",
    ) -> StreamWriter:
        """Return a writer of bytes."""
        info = _info(topic, mime_type, total_size, attributes, stream_id, name)
        return StreamWriter(self, info, destination_identities or [], is_text=False)

    async def stream_text(
        self,
        *,
        destination_identities: list[str] | None = None,
        topic: str = "",
        attributes: dict[str, str] | None = None,
        stream_id: str | None = None,
        reply_to_id: str | None = None,
        total_size: int | None = None,
        sender_identity: str | None = None,
    ) -> StreamWriter:
        """Return a writer of text."""
        info = _info(topic, "text/plain", total_size, attributes, stream_id, "")
        return StreamWriter(self, info, destination_identities or [], is_text=True)

    async def send_text(self, text: str, **options: Any) -> StreamInfo:
        """Send a whole text."""
        options.pop("compress", None)
        writer = await self.stream_text(total_size=len(text.encode()), **options)
        await writer.write(text)
        await writer.aclose()
        return writer.info

    async def send_bytes(self, data: bytes, *, name: str | None = None, **options: Any) -> StreamInfo:
        """Send all bytes."""
        options.pop("compress", None)
        writer = await self.stream_bytes(name or "unknown", total_size=len(data), **options)
        await writer.write(data)
        await writer.aclose()
        return writer.info

    # -- RPC ------------------------------------------------------------------------------------------

    async def perform_rpc(
        self,
        *,
        destination_identity: str,
        method: str,
        payload: str,
        response_timeout: float | None = None,
        max_round_trip_latency: float | None = None,
    ) -> str:
        """Call a method of another participant. Raises rtc.RpcError."""
        if len(payload.encode()) > MAX_RPC:
            raise rtc.RpcError(Code.REQUEST_PAYLOAD_TOO_LARGE, "Request payload too large")
        seconds = RPC_ANSWER_WITHIN if response_timeout is None else response_timeout
        call = secrets.token_hex(6)
        ack: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._calls[f"ack {call}"], self._calls[f"answer {call}"] = ack, answer
        what = {"do": "call", "call": call, "method": method, "payload": payload}
        try:
            within = max(RPC_ANSWER_AT_LEAST, seconds - RPC_ACK_WITHIN)
            self.relay([destination_identity], {**what, "within": within})
            try:
                await asyncio.wait_for(ack, max_round_trip_latency or RPC_ACK_WITHIN)
            except TimeoutError:
                raise rtc.RpcError(Code.CONNECTION_TIMEOUT, "Connection timeout") from None
            try:
                message = await asyncio.wait_for(answer, within)
            except TimeoutError:
                raise rtc.RpcError(Code.RESPONSE_TIMEOUT, "Response timeout") from None
        finally:
            del self._calls[f"ack {call}"], self._calls[f"answer {call}"]
        if "code" in message:
            raise rtc.RpcError(message["code"], message["text"])
        return str(message["payload"])

    def register_rpc_method(self, method_name: str, handler: Any = None) -> Any:
        """Answer calls of a method; without a handler this is a decorator."""

        def register(function: Any) -> Any:
            self._rpc_handlers[method_name] = function
            return function

        return register if handler is None else register(handler)

    def unregister_rpc_method(self, method: str) -> None:
        """Answer calls of a method no more."""
        self._rpc_handlers.pop(method, None)

    def add_rpc_interceptor(self, interceptor: Any) -> None:
        """Accept an interceptor, which livekit-agents uses for its traces."""

    def remove_rpc_interceptor(self, interceptor: Any) -> None:
        """Accept that one is no longer wanted."""

    def take_relayed(self, sender: str, what: Message) -> None:
        """Handle a call, or the answer to one."""
        match what:
            case {"do": "call", "call": call, **rest}:
                self.relay([sender], {"do": "ack", "call": call})
                task = asyncio.create_task(self._answer(sender, call, rest))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
            case {"do": "ack" | "answer" as kind, "call": call}:
                waiting = self._calls.get(f"{kind} {call}")
                if waiting is not None and not waiting.done():
                    waiting.set_result(what)

    def has_left(self, identity: str) -> None:
        """End nothing: a call to somebody who is gone ends in its time, as livekit's clients have it."""

    async def end_calls(self) -> None:
        """Cancel the handlers that still run, as the end of a room does."""
        tasks = list(self._answering)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, sender: str, call: str, what: Message) -> None:
        handler = self._rpc_handlers.get(what["method"])
        answer: Message
        if handler is None:
            answer = {"code": Code.UNSUPPORTED_METHOD, "text": "Method not supported at destination"}
        else:
            data = rtc.RpcInvocationData(
                request_id=call,
                caller_identity=sender,
                payload=what["payload"],
                response_timeout=what["within"],
            )
            answer = await self._run(handler, data)
        self.relay([sender], {"do": "answer", "call": call, **answer})

    async def _run(self, handler: Callable[..., Any], data: rtc.RpcInvocationData) -> Message:
        try:
            result = handler(data)
            if inspect.isawaitable(result):
                result = await asyncio.wait_for(_awaited(result), data.response_timeout)
        except rtc.RpcError as error:
            return {"code": error.code, "text": error.message}
        except TimeoutError:
            return {"code": Code.RESPONSE_TIMEOUT, "text": "Response timeout"}
        except Exception:  # livekit's clients tell the caller no more than this either
            return {"code": Code.APPLICATION_ERROR, "text": "Application error in method handler"}
        text = "" if result is None else str(result)
        if len(text.encode()) > MAX_RPC:
            return {"code": Code.RESPONSE_PAYLOAD_TOO_LARGE, "text": "Response payload too large"}
        return {"payload": text}

    def published(self, sid: str) -> None:
        """The server has answered a publication."""
        with contextlib.suppress(asyncio.QueueFull):
            self._published.put_nowait(sid)


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _info(
    topic: str,
    mime_type: str,
    size: int | None,
    attributes: dict[str, str] | None,
    stream_id: str | None,
    name: str,
) -> StreamInfo:
    return StreamInfo(
        stream_id=stream_id or secrets.token_hex(8),
        mime_type=mime_type,
        topic=topic,
        timestamp=int(time.time() * 1000),
        size=size,
        attributes=attributes or {},
        name=name,
    )
