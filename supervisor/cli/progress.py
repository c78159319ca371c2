"""The wait of a verb on standard error: a line that is rewritten on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from types import TracebackType
from typing import TextIO

# Seconds of one wait after which a pipe gets a line, and another. Ours: as the waits of other verbs.
SAY_AGAIN_EVERY = 10.0
# "Erase in Line": the terminal forgets the rest of the line. ECMA-48, 8.3.41.
CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Takes what is waited for as often as a wait looks, and shows what is new; use as a context manager.

    Off a terminal nothing is said with `is_quiet`, as for a verb whose reader is a program.
    """

    def __init__(self, stream: TextIO | None = None, *, is_quiet: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._is_quiet = is_quiet
        self._what = self._shown = ""
        self._say_at = math.inf

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.clear()

    def __call__(self, what: str, due: float) -> None:
        """Say what is waited for, until `due` at most, a reading of time.monotonic()."""
        now = time.monotonic()
        text = f"{what}, {max(0.0, due - now):.0f} s yet at most"
        if self._is_terminal:
            if text != self._shown:
                self._write(CLEAR_LINE + text[: _width(self._stream) - 1])
                self._shown = text
            return
        if what != self._what:
            self._what, self._say_at = what, now + SAY_AGAIN_EVERY
        elif now >= self._say_at and not self._is_quiet:
            self._say_at = now + SAY_AGAIN_EVERY
            self._write(f"{text}\n")

    def clear(self) -> None:
        """Take the line from the terminal, so that another can stand there."""
        if self._shown:
            self._write(CLEAR_LINE)
            self._shown = ""

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._is_terminal, self._is_quiet, self._shown = False, True, ""  # nobody reads it any more


def _width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
