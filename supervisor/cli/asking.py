"""The supervisor that a verb asks: the place of the socket, and the words that a shell offers after Tab.

A shell shows no error while it completes a word. So there are no words where no supervisor answers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lastcall.supervisor.cli.plain_text import plain_name
from lastcall.supervisor.cli.plain_words import Word
from lastcall.supervisor.errors import NotRunning, Refused
from lastcall.supervisor.views import control_socket
from lastcall.worker.base import variables
from lastcall.worker.base.plurals import counted


def socket_of(control: str) -> Path:
    """Return the socket that --control names, else LASTCALL_CONTROL, else the user's only one.

    Raises NotRunning.
    """
    if control == "auto":
        control = os.environ.get(variables.CONTROL, "auto")
    return control_socket.find(control)


def slot_words(given: dict[str, Any]) -> list[Word]:
    """Return the numbers of the slots, with their states."""
    return [
        (str(slot["slot"]), f"{slot['state']}, {counted(len(slot['jobs']), 'job')}") for slot in _slots(given)
    ]


def job_words(given: dict[str, Any]) -> list[Word]:
    """Return the ids of the jobs, with their rooms. In brackets typer would look for the name of a style."""
    return [
        (job["id"], plain_name(job["room"]).replace("[", "("))
        for slot in _slots(given)
        for job in slot["jobs"]
    ]


def _slots(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(NotRunning, Refused, OSError):
        path = socket_of(str(given.get("control") or "auto"))
        yield from control_socket.ask(path, "status")["slots"]
