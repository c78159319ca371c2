"""Errors of the agent's `setup_fnc` in the threads of livekit-agents' thread executor.

`ThreadJobExecutor.initialize` drops the error, and the thread counts as warm: ipc/job_thread_executor.py of
1.3.12, 1.5.7 and 1.8.9. A job thread and the worker's loop share these functions.
"""

from __future__ import annotations

from collections import deque

# Ours: as many as threads start together, and more would say the same.
_errors: deque[str] = deque(maxlen=16)


def tell(text: str) -> None:
    """Keep the text of an error until the worker takes it."""
    _errors.append(text)


def take() -> str:
    """Return the text of an error that was not taken yet; empty where there is none."""
    return _errors.popleft() if _errors else ""
