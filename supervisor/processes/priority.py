"""The share of the processor that a process gets beside others, without any right to it.

A process that has raised its nice value can't lower the value again, and its forks keep it. The scheduler's
autogroups have a nice value of another kind: the owner may raise it and set it back to 0, and each session
begins with 0 (sched(7), The autogroup feature). A worker that is forked leads a session, so the fork of an
image with a low priority has the ordinary one.

A kernel without autogroups, and a control group with the cpu controller, as most containers have, do without.
"""

from __future__ import annotations

from pathlib import Path

# Ours: about a tenth of the processor where somebody else wants the rest (sched-nice-design of the kernel).
LOW, ORDINARY = 10, 0


def set_nice(pid: int, nice: int) -> None:
    """Set the nice value of the autogroup of a process that leads a session, where that can be done."""
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))
    except (OSError, ValueError):
        return  # the process has ended, or another change was made less than 0.1 s before
