"""Starts one worker of the target on a local LiveKit server, looks at its processes, and stops it."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lastcall.supervisor.doctor.facts import Trial
from lastcall.supervisor.errors import ConfigError
from lastcall.supervisor.rehearsal.scenes import GIVE_UP_AFTER
from lastcall.supervisor.rehearsal.stage import Stage, StageError, Tell, tell_nobody
from lastcall.supervisor.views import control_socket
from lastcall.worker.base.memory import all_processes
from lastcall.worker.base.process import FORKSERVER
from lastcall.worker.base.stopping import unshielded

# Seconds for a stop without jobs, which takes one or two. Ours: of a grace of 10 s the close has a share of
# 3 s. On a node that is slow the worker was killed after them, and the stop counted as forced.
GRACE = 60.0
# Seconds until a process waits for a job, when one is started. Ours: more than livekit-agents gives a process
# (`initialize_process_timeout`, 10 s by default), which an agent may have raised.
WARM_TIMEOUT = 60.0
# Seconds until the first such process is started. Ours: an agent with num_idle_processes=0 starts none.
BEGINS_WITHIN = 10.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Messages of livekit-agents about the process of a job, from 1.3.12 to 1.8.9: ipc/supervised_proc.py and
# ipc/proc_pool.py.
BEGINS, READY, FAILED = "initializing process", "process initialized", "error initializing process"


def look(target: str, arguments: Sequence[str] = (), *, tell: Tell = tell_nobody) -> Trial:
    """Return what was seen; a target that can't be started is a finding, and raises nothing."""
    try:
        with Stage(target, arguments, grace=GRACE, tell=tell) as stage:
            stage.wait_ready()
            document = control_socket.ask(stage.directory / "control", "status")
            ours = {stage.pid, *(slot["pid"] for slot in document["slots"])}
            jobs, error = _wait_warm(stage, tell)
            if error:
                return Trial(error=f"no process becomes ready for a job, so every call would fail: {error}")
            others = _framework(stage, ours)
            holes = {f"{name} (pid {pid})": found for pid, name in others.items() if (found := open_to(pid))}
            pss = sum(_pss(pid) for pid in stage.processes() if pid != stage.pid)
            stage.signal(signal.SIGTERM)
            code = stage.wait_end(GRACE + GIVE_UP_AFTER, lambda: None)
            looked_at = len(others) if jobs & others.keys() or _forked(others) else 0
            return Trial(
                looked_at=looked_at,
                open_to=holes,
                worker_bytes=pss,
                exit_code=code,
                stop=_how_it_went(stage.receipt()),
            )
    except (StageError, ConfigError) as error:
        return Trial(error=str(error))


def _wait_warm(stage: Stage, tell: Tell) -> tuple[set[int], str]:
    """Return the processes that wait for a job, as soon as there is one, or why there will be none."""
    began = time.monotonic()
    while True:
        told: dict[str, list[dict[str, Any]]] = {}
        for line in stage.log():
            told.setdefault(str(line.get("message")), []).append(line)
        if FAILED in told:
            lines = str(told[FAILED][-1].get("exc_info", "")).strip().splitlines()
            return set(), lines[-1] if lines else FAILED
        ready = {line["pid"] for line in told.get(READY, ()) if isinstance(line.get("pid"), int)}
        due = began + (WARM_TIMEOUT if BEGINS in told else BEGINS_WITHIN)
        if ready or time.monotonic() > due:
            return ready, ""
        tell("waits for a process that is ready for a job", due)
        time.sleep(0.2)


def _how_it_went(receipt: Mapping[str, Any]) -> str:
    """Return the outcome of a stop, its time, and the phases that took a second or more."""
    if not receipt:
        return ""
    phases = [f"{phase} {took:.1f} s" for phase, took in receipt.get("phases", {}).items() if took >= 1]
    return ", ".join([f"{receipt.get('outcome')} after {receipt.get('seconds', 0):.1f} s", *phases])


def _framework(stage: Stage, ours: set[int]) -> dict[int, str]:
    """Return what multiprocessing runs for the worker: forkserver, and job processes forked from it."""
    found = {}
    for pid in stage.processes():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if pid not in ours and (name == FORKSERVER.decode() or "multiprocessing.forkserver" in command):
                found[pid] = name
    return found


def _forked(pids: Collection[int]) -> set[int]:
    """Return those whose parent is among them: job processes, also where the agent's log has no messages."""
    processes = all_processes()
    return {pid for pid in pids if pid in processes and processes[pid].parent in pids}


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
