"""Status and waits as one line of plain text each, for logs and pipes."""

from __future__ import annotations

import os
import sys
from typing import Any

from lastcall.supervisor.processes.line_breaks import broken
from lastcall.worker.base.plurals import counted

SELDOM = ("ended_by_server", "handed_over")


def status_line(document: dict[str, Any]) -> str:
    """Return the phase, each slot, and how many jobs there were."""
    slots = ", ".join(
        f"slot {s['slot']} {state_of(s)} {counted(len(s['jobs']), 'job')}" for s in document["slots"]
    )
    return f"{document['phase']}: {slots}; {totals_text(document)}"


def waits_for(document: dict[str, Any]) -> str:
    """Return the slots of a status that start or drain, each with the seconds that it has yet."""
    waits = []
    for slot in document["slots"]:
        left = slot["drain_left_s"]
        if left is not None:
            jobs = counted(len(slot["jobs"]), "job")
            waits.append(f"slot {slot['slot']} {slot['state']} ({jobs}, at most {left:.0f} s yet)")
        elif state_of(slot) == "starting":
            due = slot.get("start_left_s")  # a supervisor of another version may not say it
            yet = "" if due is None else f", at most {due:.0f} s yet"
            waits.append(f"slot {slot['slot']} starting (for {slot['since_s']:.0f} s{yet})")
    return ", ".join(waits)


def state_of(slot: dict[str, Any]) -> str:
    """Return the state of a slot, for people: a start that waits until an image is made is one too."""
    is_waiting = slot["state"] == "stopped" and slot.get("start_left_s") is not None
    return "starting" if is_waiting else str(slot["state"])


def totals_text(document: dict[str, Any]) -> str:
    """Return the totals of a status or a receipt. Unassigned jobs were no jobs here, and are left out.

    Fates that most supervisors never see are said only when a job has had them.
    """
    totals = {name: n for name, n in document["totals"].items() if n or name not in SELDOM}
    return ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in totals.items() if name != "unassigned")


def plain_name(text: str) -> str:
    """Return a name without characters that a terminal obeys: callers choose the names of rooms."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def show(text: str, *, indent: int) -> None:
    """Print lines to standard output. On a terminal those that are too wide are broken between words.

    Each further part of a line is behind `indent` cells.
    """
    if sys.stdout.isatty():
        width = os.get_terminal_size(sys.stdout.fileno()).columns or 80
        text = "\n".join(broken(line, width, indent) for line in text.split("\n"))
    print(text, flush=True)
