"""The record: everything but jobs that a stop has seen so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lastcall.worker.base.wire import ResourceFate


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceEntry:
    """How one resource of one worker, or of the supervisor, ended. `counts` are its parts by fate."""

    name: str
    fate: ResourceFate
    slot: int | None = None
    counts: dict[str, Any] = field(default_factory=dict)  # a part of the receipt, passed on as it was told


@dataclass(slots=True, kw_only=True)
class StopRecord:
    """Filled in while a stop goes on; becomes the receipt at its end. Durations are in seconds.

    `unacknowledged` are the slots that never confirmed the fence, `killed` says which process was killed and
    why, `swept` and `left` count processes. `fault` and `config_error` say why a stop was none that anybody
    asked for.
    """

    reason: str = ""
    phases: dict[str, float] = field(default_factory=dict)
    resources: list[ResourceEntry] = field(default_factory=list)
    unacknowledged: list[int] = field(default_factory=list)
    killed: list[dict[str, Any]] = field(default_factory=list)  # a part of the receipt, ready for JSON
    swept: int = 0
    left: int = 0
    gave_up: bool = False
    fault: str = ""
    config_error: str = ""
    seconds: float = 0.0
