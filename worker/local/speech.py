"""The speech of the local Inworld server: silence or a tone, as long as the text would take to speak.

Always 16-bit PCM, whichever encoding was asked for; for LINEAR16 a WAV header comes before it, once.
"""

from __future__ import annotations

import array
import base64
import functools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

# Concert pitch, at a quarter of the full scale of 16-bit PCM.
TONE_HZ = 440.0
TONE_LEVEL = 8000


@dataclass(slots=True, kw_only=True)
class Speech:
    """How the server speaks; may be changed while it serves.

    `pace`: at once, or as fast as the words would be spoken. `first_delay`: seconds before the first chunk of
    each generation.
    """

    pace: Literal["instant", "real-time"] = "instant"
    sound: Literal["silence", "tone"] = "silence"
    chunk_ms: int = 100
    chars_per_second: float = 15.0
    first_delay: float = 0.0

    def seconds(self, text: str) -> float:
        """Return how long the text takes to speak."""
        return len(text) / self.chars_per_second

    def chunks(self, text: str, sample_rate: int, *, header: bool = False) -> Iterator[str]:
        """Yield the audio of a text as base64, `chunk_ms` at a time; the last chunk is whole too."""
        for number in range(math.ceil(self.seconds(text) * 1000 / self.chunk_ms)):
            yield audio(self.sound, sample_rate, self.chunk_ms, header and number == 0)

    def alignment(self, text: str, kind: str) -> dict[str, Any]:
        """Return the `timestampInfo` of a text; its times begin at 0."""
        step = 1 / self.chars_per_second
        if kind == "CHARACTER":
            starts = [round(n * step, 3) for n in range(len(text))]
            return {
                "characterAlignment": {
                    "characters": list(text),
                    "characterStartTimeSeconds": starts,
                    "characterEndTimeSeconds": [round(start + step, 3) for start in starts],
                }
            }
        words, starts, ends, at = [], [], [], 0
        for word in text.split():
            at = text.index(word, at)
            words.append(word)
            starts.append(round(at * step, 3))
            at += len(word)
            ends.append(round(at * step, 3))
        return {"wordAlignment": {"words": words, "wordStartTimeSeconds": starts, "wordEndTimeSeconds": ends}}


@functools.lru_cache(maxsize=32)
def audio(sound: str, sample_rate: int, milliseconds: int, header: bool = False) -> str:
    """Return one chunk of mono 16-bit PCM as base64."""
    count = sample_rate * milliseconds // 1000
    data = wav_header(sample_rate) if header else b""
    if sound == "silence":
        return base64.b64encode(data + bytes(2 * count)).decode()
    step = 2 * math.pi * TONE_HZ / sample_rate
    samples = array.array("h", (int(TONE_LEVEL * math.sin(n * step)) for n in range(count)))
    return base64.b64encode(data + samples.tobytes()).decode()


def wav_header(sample_rate: int) -> bytes:
    """Return the header of mono 16-bit PCM of unknown length."""
    form = struct.pack("<IHHIIHH", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16)
    endless = struct.pack("<I", 0xFFFFFFFF)
    return b"RIFF" + endless + b"WAVEfmt " + form + b"data" + endless
