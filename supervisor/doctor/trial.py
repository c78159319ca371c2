"""Starts one worker of the target on a local LiveKit server, looks at its processes, and stops it."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from lastcall.supervisor.doctor.facts import Trial
from lastcall.supervisor.errors import ConfigError
from lastcall.supervisor.rehearsal.stage import Stage, StageError
from lastcall.supervisor.views import control_socket
from lastcall.worker.base.stopping import unshielded

# Seconds, all ours: for a stop without jobs, for a process that waits for a job, for the end of the stop.
GRACE = 10.0
WARM_TIMEOUT = 10.0
END_TIMEOUT = 20.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def look(target: str, arguments: Sequence[str] = ()) -> Trial:
    """Return what was seen; a target that can't be started is a finding, and raises nothing."""
    try:
        with Stage(target, arguments, grace=GRACE) as stage:
            stage.wait_ready()
            document = control_socket.ask(stage.directory / "control", "status")
            ours = {stage.pid, *(slot["pid"] for slot in document["slots"])}
            due = time.monotonic() + WARM_TIMEOUT
            while not (others := _framework(stage, ours)) and time.monotonic() < due:
                time.sleep(0.1)
            holes = {f"{name} (pid {pid})": found for pid, name in others.items() if (found := open_to(pid))}
            pss = sum(_pss(pid) for pid in stage.processes() if pid != stage.pid)
            stage.signal(signal.SIGTERM)
            code = stage.wait_end(END_TIMEOUT, lambda: None)
            return Trial(looked_at=len(others), open_to=holes, worker_bytes=pss, exit_code=code)
    except (StageError, ConfigError) as error:
        return Trial(error=str(error))


def _framework(stage: Stage, ours: set[int]) -> dict[int, str]:
    """Return what multiprocessing runs for the worker: forkserver, and job processes forked from it."""
    found = {}
    for pid in stage.processes():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
            if pid not in ours and "forkserver" in command:
                found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
    return found


def open_to(pid: int) -> tuple[str, ...]:
    """Return the stop signals that would end the process."""
    return tuple(number.name for number in STOP_SIGNALS if number in unshielded(pid))


def _pss(pid: int) -> int:
    """Return a process's share of memory, what it shares with others divided among them."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
