"""The loggers of lastcall in workers and jobs, which speak whatever the logging of an agent is."""

from __future__ import annotations

import logging

NAMES = ("lastcall", "lastcall.inworld", "lastcall.worker")


def enable() -> None:
    """Enable them again, once the target was loaded: `logging.config` disables the loggers that there are."""
    for name in NAMES:
        logging.getLogger(name).disabled = False
