"""Plain values: the facts, which are gathered once, and the findings of the checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lastcall.worker.base.budget import DEFAULT_GRACE, Shares

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
class ShutdownTarget:
    """A target that ends the machine, and the time after which systemd ends the machine by force."""

    name: str
    timeout: str
    action: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A worker that was started, looked at and stopped. `error` says why no worker, or no job, could be.

    `looked_at`: how many processes, 0 unless one of them waited for a job. `stop`: how the stop went.
    """

    error: str = ""
    looked_at: int = 0
    # Process by name and pid, and the stop signals that would end it.
    open_to: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    worker_bytes: int = 0
    exit_code: int | None = None
    stop: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The LiveKit server's answer to a worker's handshake.

    `skew_s` says by how many seconds the server's clock is ahead of this machine's. `dispatch_status` is that
    of the answer to a question that needs the right to dispatch agents; 0 when there was none.
    """

    url: str
    error: str = ""
    status: int = 0
    skew_s: float | None = None
    dispatch_status: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """A private name that the installed `package` should have. `lack` says what is not there; "" if it is.

    `without` says what lastcall does in place of the name; "" where it would not start.
    """

    package: str
    version: str
    name: str
    needed_by: str
    without: str
    lack: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that the checks look at. A fact is None when it is not known, or there is no such thing."""

    config_error: str = ""
    target: str = ""
    grace: float = DEFAULT_GRACE
    shares: Shares = field(default_factory=Shares)
    workers: int = 1
    http: str = "127.0.0.1:8080"
    pid: int = 2
    init: tuple[str, ...] = ("systemd",)
    # The command lines of the children of PID 1.
    init_children: tuple[tuple[str, ...], ...] = ()
    in_container: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    unit: Unit | None = None
    shutdown_targets: tuple[ShutdownTarget, ...] = ()
    livekit_agents: str | None = None
    # It is None where livekit-agents can't be imported.
    names: tuple[Name, ...] | None = None
    has_inworld_plugin: bool = False
    has_inworld_key: bool = False
    memory_limit: int | None = None
    # Whether the kernel kills all processes of the cgroup with the one that has found no memory; cgroup v2.
    dies_as_group: bool | None = None
    job_memory_mb: int = 0
    processes_limit: int | None = None
    open_files: int = 65536
    trial: Trial | None = None
    livekit: Answer | None = None
    hands_over: bool = True
    http_problem: str = ""
    place_problems: tuple[str, ...] = ()
    # Of a supervisor that runs here: each worker whose job processes did not all get ready, and why.
    process_failures: tuple[str, ...] = ()
    # Of that supervisor: why workers start without the image, and what the image has not imported.
    image_limits: tuple[str, ...] = ()
