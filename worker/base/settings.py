"""The settings that a worker process is given at its start."""

from __future__ import annotations

import json
import math
import os
from collections.abc import MutableMapping
from dataclasses import asdict, field, fields
from typing import Any

from lastcall.worker.base import variables
from lastcall.worker.base.budget import DEFAULT_GRACE, Deadlines, Shares, installed_entrypoint_wait, plan
from lastcall.worker.base.records import dataclass

# Seconds. Before the shutdown callbacks livekit-agents gives the entrypoint 15 s, the session 60 s, and
# `on_session_end` 300 s (ipc/job_proc_lazy_main.py, and `session_end_timeout` in worker.py, both of 1.8).
# Ours: 25 s for the callbacks.
DEFAULT_FINISH = 400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """How long each job is kept open, and the socket that hears how the job goes.

    `job_seconds`: from the stop on. `work_seconds`: of a shutdown callback behind it. `stop`: the path of the
    file that appears when the stop begins. `socket`: the path of the datagram socket that hears the job.
    """

    job_seconds: float
    stop: str
    socket: str
    work_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverSettings:
    """`[handover]` of the configuration; times are in seconds.

    `wait`: for an agent to be no longer busy. `patience`: from a dispatch until a successor is in the room.
    `limit`: how often one call is handed over. `on_cloud`: for hosts of LiveKit Cloud too.
    """

    enabled: bool = True
    on_cloud: bool = False
    wait: float = 5.0
    patience: float = 5.0
    limit: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Budget, limits, descriptors and place of one worker; times are in seconds.

    The supervisor builds one value for all workers (`supervisor.program`), replaces the last seven fields for
    each worker (`processes.launch`), and hands the value over as JSON in one variable.

    `max_running`: the most jobs at a time, 0 for no limit. `job_memory_limit`: bytes, 0 for no limit.
    `finish`: for the work of a job after its agent has left the room.
    `local_url`: the local server. The worker may register with no other, and its jobs have rooms of it.
    `output_fds`: the read ends of the standard output and error of the worker. `lifeline_fd`: only held, for
    as long as the worker lives. `scratch`: the directory for the sockets of multiprocessing. `tells_imports`:
    whether the worker says which files its target has imported. `is_image`: whether the process is to be the
    image, which forks workers (`sdk.image_process`).
    """

    grace: float = DEFAULT_GRACE
    shares: Shares = field(default_factory=Shares)
    beat: float = 1.0
    max_running: int = 0
    job_memory_limit: int = 0
    finish: float = DEFAULT_FINISH
    handover: HandoverSettings = field(default_factory=HandoverSettings)
    coloured: bool = False
    local_url: str = ""
    tells_imports: bool = False
    rehearsal: Rehearsal | None = None
    control_fd: int | None = None
    output_fds: tuple[int, ...] = ()
    lifeline_fd: int | None = None
    slot: int = 0
    generation: int = 1
    scratch: str = ""
    is_image: bool = False

    def plan(self, started_at: float) -> Deadlines:
        """Return the deadlines of a stop that no supervisor has planned: the same as the supervisor's."""
        return plan(started_at, self.grace, self.shares)

    def to_json(self) -> str:
        """Return the settings as the text that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerSettings:
        """Return the settings that `to_json` wrote, perhaps in an older or a newer version.

        After an upgrade and a reload the supervisor is older than the workers that it starts: keys that are
        not known are left out, keys that are missing have their defaults.
        """
        values = json.loads(text)
        known = _known(cls, values)
        known["shares"] = Shares(**_known(Shares, known.get("shares", {})))
        known["handover"] = HandoverSettings(**_known(HandoverSettings, known.get("handover", {})))
        known["output_fds"] = tuple(known.get("output_fds", ()))
        if known.get("rehearsal") is not None:
            known["rehearsal"] = Rehearsal(**_known(Rehearsal, known["rehearsal"]))
        return cls(**known)

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> WorkerSettings:
        """Read the settings and remove them from the environment, so that no child inherits them.

        Without a supervisor there are none, and LASTCALL_GRACE is the whole budget.
        """
        text = environ.pop(variables.WORKER, "")
        if text:
            return cls.from_json(text)
        grace = _grace_of(environ.get(variables.GRACE, ""))
        shares = Shares(entrypoint_wait=installed_entrypoint_wait())
        return cls(grace=grace, shares=shares, coloured=os.isatty(1))


def _known(
    kind: type[WorkerSettings | Shares | Rehearsal | HandoverSettings], values: dict[str, Any]
) -> dict[str, Any]:
    """Return the values that a type has fields for. They are JSON, so they may be anything."""
    return {each.name: values[each.name] for each in fields(kind) if each.name in values}


def _grace_of(text: str) -> float:
    try:
        grace = float(text)
    except ValueError:
        return DEFAULT_GRACE
    return grace if grace > 0 and math.isfinite(grace) else DEFAULT_GRACE
