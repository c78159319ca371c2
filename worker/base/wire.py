r"""The control protocol between the supervisor and one worker.

A stream socketpair carries one JSON object per line, UTF-8, at most MAX_LINE bytes with its newline:

    {"type": "hello", "v": 1, "pid": 4711}\n
    {"type": "fence", "v": 1, "reason": "SIGTERM"}\n

Both sides ignore types and keys they don't know, so that either may be the newer one; a message of another
major version (`v`) is an error. End of file is the death notice in both directions.

| worker says | with |
| --- | --- |
| hello | pid |
| loaded | agent_name, sdk |
| ready | worker_id, warm: registered with the LiveKit server, at each (re)connection |
| beat | lag_ms, load, jobs, rss_bytes, registered, accepting, warm (a process waits for its first job) |
| job_started | job {id, room, dispatch_id, pid or null, accepted_at}: accepted, and again once it runs |
| job_ended | id, fate (finished, failed, cut, lost, unassigned), seconds |
| fenced | reason, at: no offer is answered with yes since then, by the monotonic clock |
| drained | jobs left |
| resource | name, fate (closed, forced, leaked), counts |
| closed | nothing more to do, the process is about to exit |
| metrics | id, text: its own metrics as Prometheus text, empty when too long |
| shield | pid, open_to: a process that a stop signal would reach |
| log | event, and whatever belongs to it |
| fault | exit (78 or 70 or 1), message, traceback |

| supervisor says | with |
| --- | --- |
| hold | on |
| fence | reason |
| drain | seconds until jobs are asked to shut down, and seconds for that close |
| hurry | seconds for the close, which begins now |
| close | nothing: kill what is left and leave |
| ping | answered by a beat |
| metrics | id; answered by metrics |
"""

from __future__ import annotations

import json
from typing import Any

from lastcall.worker.base.errors import WireError

VERSION = 1
MAX_LINE = 256 * 1024

Message = dict[str, Any]


def encode(type: str, **fields: Any) -> bytes:
    """Return one line for a message. Raises WireError when it would be longer than a reader accepts."""
    line = json.dumps({"type": type, "v": VERSION, **fields}, separators=(",", ":")).encode() + b"\n"
    if len(line) > MAX_LINE:
        raise WireError(f"control message {type!r} has {len(line)} bytes, at most {MAX_LINE} are allowed")
    return line


def decode(line: bytes) -> Message:
    """Return the message of one line. Raises WireError for anything that is not one."""
    try:
        message = json.loads(line)
    except ValueError as error:
        raise WireError(f"control message is not JSON: {line[:80]!r}") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise WireError(f"control message has no type: {line[:80]!r}")
    if message.get("v") != VERSION:
        raise WireError(f"control message speaks version {message.get('v')!r}, expected {VERSION}")
    return message


class Decoder:
    """Turn chunks of a byte stream into messages; never holds more than one line."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, chunk: bytes) -> list[Message]:
        """Return the messages that this chunk completes. Raises WireError as `decode` does."""
        self._rest += chunk
        *lines, rest = self._rest.split(b"\n")
        if len(rest) > MAX_LINE:
            raise WireError(f"control message is longer than {MAX_LINE} bytes")
        self._rest = bytearray(rest)
        return [decode(bytes(line)) for line in lines if line]
