"""What the checks know: plain values, gathered once. And what they answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lastcall.worker.base.budget import DEFAULT_GRACE

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line why, and one line what to do; the latter is empty when all is well."""

    check: str
    verdict: Verdict
    why: str
    do: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The systemd unit that we run in, or are asked about; properties as `systemctl show` names them."""

    name: str
    properties: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A worker that was started, looked at and stopped. `error`: why it could not be."""

    error: str = ""
    looked_at: int = 0
    # Process by name and pid, and the stop signals that would end it.
    open_to: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    worker_bytes: int = 0
    exit_code: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the LiveKit server said to a worker's handshake. `skew_s`: its clock ahead of ours."""

    url: str
    error: str = ""
    status: int = 0
    skew_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything that the checks look at. None: not known, or there is no such thing."""

    config_error: str = ""
    target: str = ""
    grace: float = DEFAULT_GRACE
    workers: int = 1
    http: str = "127.0.0.1:8080"
    pid: int = 2
    init: tuple[str, ...] = ("systemd",)
    # The command lines of PID 1's own children.
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
