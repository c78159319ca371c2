"""The record: everything but jobs that a stop has seen so far."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from lastcall.worker.base.budget import Deadlines
from lastcall.worker.base.records import dataclass
from lastcall.worker.base.wire import ResourceFate

Asked = Literal["stop", "hurry", "kill"]
# Ours: a person presses Ctrl-C three times, and a script that sends SIGQUIT for ever adds nothing.
MAX_ASKED = 10


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
    asked for. `started_at` is a reading of the monotonic clock. `deadlines` are those of the plan. `asked`
    says when the stop was asked for, and when more haste. Both count from the beginning of the stop.
    """

    reason: str = ""
    started_at: float | None = None
    deadlines: dict[str, float] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)  # a part of the receipt, ready for JSON
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

    def begin(self, reason: str, started_at: float, deadlines: Deadlines) -> None:
        """Note the beginning of the stop, and by when each phase has to be over."""
        self.reason, self.started_at = reason, started_at
        self.deadlines = {
            name: round(at - started_at, 3)
            for name, at in (
                ("fence", deadlines.fence_at),
                ("drain", deadlines.drain_at),
                ("close", deadlines.close_at),
                ("terminate", deadlines.terminate_at),
                ("kill", deadlines.kill_at),
                ("end", deadlines.end_at),
            )
        }
        self.ask("stop", started_at)

    def ask(self, what: Asked, at: float) -> None:
        """Note that the stop was asked for, or for more haste in it. Asking `MAX_ASKED` times is enough."""
        if self.started_at is not None and len(self.asked) < MAX_ASKED:
            self.asked.append({"for": what, "after": round(at - self.started_at, 3)})
