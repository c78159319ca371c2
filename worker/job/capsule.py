"""The capsule of a call: the state that a successor needs, any JSON value of up to 262,144 bytes.

It stays in the process of the job until a successor asks for it. No log and no error shows a part of it.

The text is UTF-8 without escapes (`ensure_ascii=False`): a letter of any language takes at most four bytes,
and not six. Tuples become lists. Keys have to be strings, because JSON makes strings of numbers, and a
successor would look for the numbers in vain.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from lastcall.worker.base.clock import now

# Bytes of the text. Ours: the history of a long call has some dozens of kB, and LiveKit carries 200 kB from
# one agent to another in 0.2 s.
MAX_BYTES = 262_144
# Lists and objects in one another. Ours: CPython 3.11 reads up to its recursion limit of 1,000, less the
# calls that are under way. CPython 3.14 writes 50,000, which a successor on another Python could not read.
MAX_DEPTH = 500
# Seconds for a provider. Ours: the agent goes on speaking meanwhile, and a stop may be near its end.
PROVIDER_WITHIN = 1.0
SCALARS = frozenset({int, float, bool, type(None)})


class NotJson(TypeError):
    """Raised for a state that holds something for which JSON has no text. Names the type, and no value.

    Raised, too, for lists and objects that are more than MAX_DEPTH deep in one another.
    """


class TooLarge(ValueError):
    """Raised for a state of more than MAX_BYTES. Names the size and the limit."""


def encode(state: object) -> bytes:
    """Return a state as UTF-8 JSON. Raises NotJson and TooLarge.

    The time is bounded by the limit, and not by the size of the state.
    """
    _look_through(state)
    try:
        text = json.dumps(state, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        line = text.encode()
    except UnicodeEncodeError:
        raise NotJson("the state has a text with a lone surrogate, which UTF-8 can't have") from None
    except (TypeError, ValueError, RecursionError) as error:
        # NaN, infinity, a structure that is too deep; the texts of these errors hold no value of the state
        raise NotJson(f"the state is no JSON: {type(error).__name__}") from None
    if len(line) > MAX_BYTES:
        raise TooLarge(f"the state has {len(line)} bytes of JSON, at most {MAX_BYTES} are allowed")
    return line


def _look_through(state: object) -> None:
    """Find what json.dumps would change silently, and stop early in what is far too large.

    Each value counts with the least that its text takes. A structure that contains itself has no end, and is
    too large as well.
    """
    least, depth = 0, -1  # the list around the state does not count
    level: list[Any] = [[state]]  # Any: the parts of any value
    try:
        while level and least + len(level) <= MAX_BYTES:
            below: list[Any] = []
            for value in level:
                parts: Collection[Any] = ()
                if isinstance(value, dict):
                    parts = value.values()
                elif isinstance(value, list | tuple):
                    parts = value
                elif not isinstance(value, str | int | float):  # these are of a class of the agent
                    raise NotJson(f"the state has a value of type {type(value).__name__}, which JSON has not")
                least += len(parts)
                if least + len(below) > MAX_BYTES:
                    break
                for key in value if isinstance(value, dict) else ():
                    if not isinstance(key, str):
                        raise NotJson(f"the state has a key of type {type(key).__name__}, expected str")
                    least += len(key) + 3
                for part in parts:
                    kind = type(part)
                    if kind is str:
                        least += len(part)
                    elif kind not in SCALARS:
                        below.append(part)
            level = below
            depth += 1
    except RuntimeError as error:  # another thread has changed a dict
        raise NotJson("the state has changed while it was read") from error
    if least + len(level) > MAX_BYTES:
        raise TooLarge(f"the state has more than {MAX_BYTES} bytes of JSON, or contains itself")
    if depth > MAX_DEPTH:
        raise NotJson(f"the state has lists or objects in one another more than {MAX_DEPTH} deep")


Provider = Callable[[], Awaitable[object] | object]


class Capsule:
    """The newest state that a call has kept, or the function that has it."""

    def __init__(self) -> None:
        self._line: bytes | None = None
        self._provider: Provider | None = None
        self._kept_at = 0.0
        # How often something was kept: a state that was sent is old once this has changed.
        self.version = 0

    def keep(self, state: object) -> None:
        """Keep a state as it is now, or a function that returns it when it is needed; the last one counts.

        Raises NotJson and TooLarge, and what was kept before stays.
        """
        if callable(state):
            self._line, self._provider = None, state
        else:
            self._line, self._provider = encode(state), None
        self._kept_at = now()
        self.version += 1

    @property
    def is_kept(self) -> bool:
        return self._line is not None or self._provider is not None

    @property
    def about(self) -> tuple[int, float] | None:
        """Bytes, 0 of a provider, and when that was kept; None where nothing was."""
        return (len(self._line or b""), self._kept_at) if self.is_kept else None

    async def read(self) -> bytes | None:
        """Return the state as JSON, or None where nothing was kept.

        Raises NotJson, TooLarge, whatever a provider raises, and TimeoutError after PROVIDER_WITHIN.
        """
        if self._provider is None:
            return self._line
        state = self._provider()
        if inspect.isawaitable(state):
            async with asyncio.timeout(PROVIDER_WITHIN):
                state = await state
        return encode(state)


class Busy:
    """Counts the parts of an agent that must not be interrupted: `async with busy.during():`."""

    def __init__(self) -> None:
        self._users = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_busy(self) -> bool:
        return self._users > 0

    @asynccontextmanager
    async def during(self) -> AsyncIterator[None]:
        """Count as busy inside the block; blocks may lie in one another."""
        self._users += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._idle.set()

    async def until_idle(self) -> None:
        """Return when no block is open."""
        while self._users:
            await self._idle.wait()
