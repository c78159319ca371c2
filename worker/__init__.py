"""The worker side of lastcall: hosts one AgentServer and ends it without cutting a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .jobend import closing

__all__ = ["closing"]


def __getattr__(name: str) -> Any:
    # On demand: this file runs before the first statement of `__main__`, which blocks the signals.
    if name == "closing":
        from .jobend import closing

        return closing
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
