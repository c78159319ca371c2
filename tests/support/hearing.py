"""Messages of one kind among all that a test has heard over a control channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lastcall.worker.base.clock import now
from lastcall.worker.base.condition import Condition


async def last_of(
    kind: type[Any], heard: Sequence[object], changed: Condition, *, patience: float
) -> Any:  # the message of that class; no narrower type fits all
    """Return the last message of a class, once there is one. Fails after `patience` seconds."""

    def last() -> Any:
        return next((message for message in reversed(heard) if isinstance(message, kind)), None)

    at = now() + patience
    assert await changed.until(lambda: last() is not None, lambda: at), heard
    return last()
