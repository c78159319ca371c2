"""What a worker process is told at its birth."""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping
from dataclasses import dataclass

VARIABLE = "LASTCALL_WORKER"
GRACE = 3600.0
CLOSE = 25.0
END = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Budget in seconds, descriptors, and place; the supervisor hands them over as JSON in one variable.

    `drain` and `close` are only what a worker uses until the supervisor sends better ones, and when it has
    lost the supervisor. `max_running` is the most jobs at a time, 0 for no limit. `output_fds` are the read
    ends of the worker's own standard output and error. `lifeline_fd` is only held, for as long as we live.
    `hold`: seconds that a rehearsal keeps each job open. `scratch`: for multiprocessing's sockets.
    """

    control_fd: int | None = None
    output_fds: tuple[int, ...] = ()
    lifeline_fd: int | None = None
    slot: int = 0
    generation: int = 1
    drain: float = GRACE - CLOSE - END
    close: float = CLOSE
    beat: float = 1.0
    max_running: int = 0
    coloured: bool = False
    mock_room: bool = False
    hold: float = 0.0
    scratch: str = ""

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Settings:
        """Read the settings and remove them from the environment, so that no child inherits them."""
        text = environ.pop(VARIABLE, "")
        if text:
            values = json.loads(text)
            values["output_fds"] = tuple(values.get("output_fds", ()))
            return cls(**values)
        grace = _seconds(environ.get("LASTCALL_GRACE", ""))
        reserved = min(CLOSE + END, grace / 2)
        close = reserved * CLOSE / (CLOSE + END)
        return cls(drain=grace - reserved, close=close, coloured=os.isatty(1))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return GRACE
    return value if value > 0 else GRACE
