"""Audio of a local room: each frame is a tick, which has a number and a length, and no sound.

`AudioSource`, `LocalAudioTrack` and `AudioStream` have the names and the timing of livekit's, so that an
AgentSession speaks and hears through them. A source plays its frames one after the other, each for as long as
it is, and numbers them from 1: a listener can tell a gap and an overlap.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from livekit import rtc

from lastcall.worker.base.clock import now

Hear = Callable[[int, float], None]
# Ticks that wait for one reader. Ours: ten seconds of frames of 10 ms.
MAX_WAITING = 1000


class AudioSource:
    """Plays captured frames in real time."""

    def __init__(
        self, sample_rate: int, num_channels: int, queue_size_ms: int = 1000, loop: Any = None
    ) -> None:
        self.sample_rate = sample_rate
        self.num_channels = num_channels
        self._queue_size = queue_size_ms / 1000
        self._waiting: deque[float] = deque()
        self._playing: asyncio.Task[None] | None = None
        self._played_until = 0.0
        self._number = 0
        self.hear: Hear | None = None

    @property
    def queued_duration(self) -> float:
        """Seconds that are captured and not played."""
        return sum(self._waiting) + max(0.0, self._played_until - now())

    async def capture_frame(self, frame: Any) -> None:
        """Take a frame; waits while more than the size of the queue is there."""
        self._waiting.append(frame.samples_per_channel / frame.sample_rate)
        if self._playing is None or self._playing.done():
            self._playing = asyncio.create_task(self._play())
        while self.queued_duration > self._queue_size:  # noqa: ASYNC110  # the time is known
            await asyncio.sleep(self.queued_duration - self._queue_size)

    def clear_queue(self) -> None:
        """Drop what is not played."""
        self._waiting.clear()

    async def wait_for_playout(self) -> None:
        """Return once everything is played."""
        while (left := self.queued_duration) > 0:  # noqa: ASYNC110  # the time is known
            await asyncio.sleep(left)

    async def aclose(self) -> None:
        """Play no more."""
        self._waiting.clear()
        if self._playing is not None:
            self._playing.cancel()
            await asyncio.wait([self._playing])

    async def _play(self) -> None:
        self._played_until = max(self._played_until, now())
        while self._waiting:
            seconds = self._waiting.popleft()
            self._number += 1
            self._played_until += seconds
            if self.hear is not None:
                self.hear(self._number, seconds)
            await asyncio.sleep(max(0.0, self._played_until - now()))


class Track:
    """An audio track."""

    def __init__(self, name: str, sid: str = "") -> None:
        self.name = name
        self.sid = sid
        self.muted = False
        self.kind = rtc.TrackKind.KIND_AUDIO
        self.stream_state = rtc.StreamState.STATE_ACTIVE


class LocalAudioTrack(Track):
    """A track that plays a source."""

    def __init__(self, name: str, source: Any) -> None:
        super().__init__(name)
        self._source = source

    @staticmethod
    def create_audio_track(name: str, source: Any) -> LocalAudioTrack:
        """Return a track for a source."""
        return LocalAudioTrack(name, source)

    def attach(self, sid: str, hear: Hear | None) -> None:
        """Have the ticks of the source go to a publication."""
        self.sid = sid
        self._source.hear = None if hear is None else lambda n, s: None if self.muted else hear(n, s)

    def mute(self) -> None:
        """Be silent."""
        self.muted = True

    def unmute(self) -> None:
        """Be heard again."""
        self.muted = False


class RemoteAudioTrack(Track):
    """A track of another participant."""

    def __init__(self, name: str, sid: str) -> None:
        super().__init__(name, sid)
        self.readers: list[AudioStream] = []

    def tick(self, number: int, seconds: float) -> None:
        """Hand a tick to everybody who listens."""
        for reader in self.readers:
            reader.hear(number, seconds)


class AudioStream:
    """Reads a remote track: frames of silence, of the length of each tick, with its number in `userdata`."""

    def __init__(
        self, track: Any, loop: Any = None, capacity: int = 0, sample_rate: int = 48000, **options: Any
    ) -> None:
        self._track = track
        self._sample_rate = sample_rate
        self._num_channels = int(options.get("num_channels", 1))
        self._ticks: asyncio.Queue[tuple[int, float] | None] = asyncio.Queue(maxsize=MAX_WAITING)
        if isinstance(track, RemoteAudioTrack):
            track.readers.append(self)

    @classmethod
    def from_track(cls, *, track: Any, **options: Any) -> AudioStream:
        """Return a reader of a track."""
        return cls(track, **options)

    def hear(self, number: int, seconds: float) -> None:
        """Take a tick; a reader that reads nothing misses the rest."""
        if not self._ticks.full():
            self._ticks.put_nowait((number, seconds))

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        tick = await self._ticks.get()
        if tick is None:
            raise StopAsyncIteration
        number, seconds = tick
        samples = round(seconds * self._sample_rate)
        frame = rtc.AudioFrame(
            data=bytes(2 * samples * self._num_channels),
            sample_rate=self._sample_rate,
            num_channels=self._num_channels,
            samples_per_channel=samples,
        )
        frame.tick = number  # livekit's own frames have no number
        return rtc.AudioFrameEvent(frame=frame)

    async def aclose(self) -> None:
        """Read no more."""
        if isinstance(self._track, RemoteAudioTrack) and self in self._track.readers:
            self._track.readers.remove(self)
        while self._ticks.full():
            self._ticks.get_nowait()
        self._ticks.put_nowait(None)
