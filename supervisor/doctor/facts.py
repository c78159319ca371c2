"""Plain values: the facts, which are gathered once, and the findings of the checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lastcall.worker.base.budget import DEFAULT_GRACE

# `warn`: lastcall runs, but less well than it could. `fail`: calls would be cut, or lastcall would not start.
Severity = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line why, and one line what to do; the latter is empty when all is well."""

    check: str
    verdict: Severity
    why: str
    do: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The systemd unit that the doctor runs in, or is asked about; `systemctl show` names the properties."""

    name: str
    properties: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A worker that was started, looked at and stopped. `error` says why no worker could be."""

    error: str = ""
    looked_at: int = 0
    # Process by name and pid, and the stop signals that would end it.
    open_to: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    worker_bytes: int = 0
    exit_code: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The LiveKit server's answer to a worker's handshake.

    `skew_s` says by how many seconds the server's clock is ahead of this machine's.
    """

    url: str
    error: str = ""
    status: int = 0
    skew_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that the checks look at. A fact is None when it is not known, or there is no such thing."""

    config_error: str = ""
    target: str = ""
    grace: float = DEFAULT_GRACE
    workers: int = 1
    http: str = "127.0.0.1:8080"
    pid: int = 2
    init: tuple[str, ...] = ("systemd",)
    # The command lines of the children of PID 1.
    init_children: tuple[tuple[str, ...], ...] = ()
    in_container: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    unit: Unit | None = None
    livekit_agents: str | None = None
    has_inworld_plugin: bool = False
    has_inworld_key: bool = False
    memory_limit: int | None = None
    processes_limit: int | None = None
    open_files: int = 65536
    trial: Trial | None = None
    livekit: Answer | None = None
    http_problem: str = ""
    place_problems: tuple[str, ...] = ()
    # Of a supervisor that runs here: each worker whose job processes did not all get ready, and why.
    process_failures: tuple[str, ...] = ()
