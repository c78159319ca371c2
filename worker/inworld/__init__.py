"""Inworld's text-to-speech under lastcall. Agents reach `TTS` as `lastcall.inworld.TTS`.

`TTS` needs livekit-plugins-inworld. The pool and the broker do not, and they run where the plugin is not
installed, so the plugin is imported at the first use of `TTS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lastcall.worker.inworld.plugin.tts import TTS

__all__ = ["TTS"]


def __getattr__(name: str) -> object:
    """Import `TTS` at its first use. Raises ImportError where the plugin is not installed."""
    if name == "TTS":
        from lastcall.worker.inworld.plugin.tts import TTS

        return TTS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
