"""Inworld's text-to-speech under lastcall. `TTS` needs livekit-plugins-inworld, nothing else here does."""

from __future__ import annotations

from typing import Any

__all__ = ["TTS"]


def __getattr__(name: str) -> Any:
    if name == "TTS":
        from lastcall.worker.inworld.plugin.tts import TTS

        return TTS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
