"""The exit codes of lastcall's processes, all of them; from 64 on as in sysexits.h."""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    """How a supervisor, a verb, a worker or the Inworld broker ended."""

    CLEAN = 0
    """It did what it was asked to. A stop: no job was cut or lost, all is closed, nothing is left."""

    FAILED = 1
    """A verb: the supervisor refused, or failed at it. A worker: its target raised, or its server is lost."""

    USAGE = 2
    """The command line is wrong."""

    GAVE_UP = 69
    """No worker could be kept up. A verb: there is no supervisor."""

    FAULT = 70
    """A fault in lastcall itself. The broker: also a key that never came."""

    FORCED = 75
    """The stop is over, but a job was cut, or something had to be forced."""

    CONFIG = 78
    """The configuration or the target is wrong: a later start would fail in the same way."""
