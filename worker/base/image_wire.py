"""The packets between the supervisor and an image: JSON, with descriptors beside it.

    supervisor → image    {"number": 1, "settings": "…", "mark": "…", "numbers": [0, 1, 2, 3, 4, 5, 7]}
                          and a descriptor for each of the numbers
    image → supervisor    {"ready": "", "packages": 7, "left_out": {"watchdog": "it has started a thread"}},
                          or {"ready": "…"}, the reason why it can fork no workers
                          {"number": 1, "error": "…"}: there is no worker
    worker → supervisor   {"number": 1, "pid": 4711}, and a pidfd of the worker
    supervisor → worker   GO, in the pipe that the last descriptor reads

A number is answered once. A worker that gets end of file in place of GO ends without a trace: the supervisor
has given the request up, or has ended.
"""

from __future__ import annotations

import json
from dataclasses import asdict, field

from lastcall.worker.base.records import dataclass

# Bytes of a packet, and descriptors beside it. Ours: settings are below 2 kB, and a worker has eight.
MAX_BYTES = 1 << 16
MAX_DESCRIPTORS = 16
# The number of the pipe for GO in the worker, behind those that a worker keeps.
GO_FD = 7
GO = b"g"
# Seconds. Ours: the supervisor answers in its next turn, unless it is held up, as by SIGSTOP. It would count
# a failed start where the worker has ended meanwhile.
GO_WITHIN = 60.0
# Seconds for the first fork to end, and the kernel to give the worker to the supervisor. Ours: the first fork
# does nothing else.
ADOPTED_WITHIN = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One worker to fork. `settings` are `WorkerSettings` as JSON."""

    number: int
    settings: str
    mark: str
    numbers: list[int]

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, packet: bytes) -> Request:
        return cls(**json.loads(packet))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A packet of an image, or of a worker that it has forked. `ready` is None in an answer to a request.

    `packages` is the number of installed packages that were imported for the target alone.
    `scout_was_killed` tells that the scout was killed, or the trial of a package.
    """

    ready: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    packages: int = 0
    scout_was_killed: bool = False
    number: int = 0
    pid: int = 0
    error: str = ""

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, packet: bytes) -> Answer:
        """Raises ValueError or TypeError for nonsense."""
        return cls(**json.loads(packet))
