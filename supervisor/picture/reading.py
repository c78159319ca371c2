"""Reads receipts: from the file of `--receipt`, from standard input, or out of a log.

A receipt is untrusted. The names of rooms come from callers, and a log may hold anything. So every value is
checked, text loses the characters that steer a terminal, and no more than `MAX_BYTES` are read at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lastcall.supervisor.config.user_files import words_of
from lastcall.supervisor.errors import UsageError
from lastcall.supervisor.receipt.document import SCHEMA

# Ours: a receipt has 300 bytes for each job, so this is one of 200 000 jobs.
MAX_BYTES = 64 * 1024 * 1024
# Characters of one text. Ours: the longest is the reason of a stop that gave up.
MAX_TEXT = 500
# Seconds. Ours: 30 years, so that no scale of a picture overflows.
MAX_SECONDS = 1e9
STANDARD_INPUT = "-"
EXPECTED = "expected a file written by --receipt, or a log with the event receipt"


def printable(text: str) -> str:
    """Return a text without characters that a terminal obeys, and no longer than `MAX_TEXT`."""
    shown = text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
    return "".join(c if c.isprintable() else "\ufffd" for c in shown)


Text = Annotated[str, AfterValidator(printable)]
Seconds = Annotated[float, Field(ge=-MAX_SECONDS, le=MAX_SECONDS, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Pid = Annotated[int, Field(ge=0, le=2**31)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class SeenJob(_Part):
    """One job of a receipt. The two last times are absent in receipts of 0.1.0."""

    id: Text
    room: Text
    slot: Count
    generation: Count = 0
    seconds: Seconds
    fate: Text | None = None
    process: Text = ""
    ended_after: Seconds | None = None
    asked_after: Seconds | None = None


class SeenResource(_Part):
    """One resource of a receipt; `counts` are its parts by fate."""

    name: Text
    fate: Text
    slot: Count | None = None
    counts: dict[Text, dict[Text, Count]] = Field(default_factory=dict)


class SeenAsk(_Part):
    """One request of the stop: `stop`, `hurry` or `kill`."""

    what: Text = Field(alias="for")
    after: Seconds


class SeenReceipt(_Part):
    """A receipt that was checked; the fields are those of docs/operations.md."""

    reason: Text
    outcome: Text
    exit_code: Count
    pid: Pid = 0
    at: Text = ""
    grace: Seconds
    seconds: Seconds
    phases: dict[Text, Seconds]
    deadlines: dict[Text, Seconds] = Field(default_factory=dict)
    asked: tuple[SeenAsk, ...] = ()
    totals: dict[Text, Count]
    jobs: tuple[SeenJob, ...]
    resources: tuple[SeenResource, ...] = ()
    fence_unacknowledged: tuple[Count, ...] = ()
    killed: tuple[dict[str, Any], ...] = ()  # parts differ; the picture counts them
    swept: Count = 0
    left: Count = 0
    fault: Text | None = None
    versions: dict[Text, Text] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The last receipt of a source, and how many the source has."""

    receipt: SeenReceipt
    count: int = 1


class _CutOffError(Exception):
    """Raised for JSON that ends too early."""


def read(source: str) -> Found:
    """Return the last receipt in a file, or in standard input for `-`. Raises UsageError with one line."""
    name = "standard input" if source == STANDARD_INPUT else repr(source)
    try:
        if source == STANDARD_INPUT:
            return find(sys.stdin.buffer, name)
        with Path(source).open("rb") as file:
            return find(file, name)
    except (OSError, ValueError) as error:
        raise UsageError(f"receipt: {name} can't be read: {words_of(error)}; {EXPECTED}") from error


def find(file: IO[bytes], name: str) -> Found:
    """Return the last receipt in a file of bytes. Raises UsageError with one line that has `name`."""
    first = b""
    while not first.strip():
        first = file.readline(MAX_BYTES)
        if not first:
            raise UsageError(f"receipt: {name} is empty; {EXPECTED}")
    try:
        if first.strip() == b"{":  # as `--receipt` writes it, over many lines
            return Found(receipt=check(_parse(first + _rest(file, name), name), name))
        return _last_of(first, file, name)
    except _CutOffError:
        raise UsageError(
            f"receipt: {name} is cut off: the JSON ends too early; copy the whole file"
        ) from None


def check(document: object, name: str) -> SeenReceipt:
    """Return a receipt whose values are in order. Raises UsageError with one line that has `name`."""
    if not isinstance(document, dict) or "outcome" not in document:
        raise UsageError(f"receipt: {name} is no receipt; {EXPECTED}")
    schema = document.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise UsageError(
            f"receipt: {name} has schema {min(schema, 10**9)}, of a newer lastcall; this one reads up to"
            f" {SCHEMA}: upgrade lastcall"
        )
    try:
        return SeenReceipt.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = printable(".".join(map(str, first["loc"])))
        raise UsageError(f"receipt: {name} is no receipt: {where}: {first['msg']}; {EXPECTED}") from None


def _rest(file: IO[bytes], name: str) -> bytes:
    rest = file.read(MAX_BYTES)
    if len(rest) == MAX_BYTES:
        raise UsageError(f"receipt: {name} is larger than {MAX_BYTES // 2**20} MB; {EXPECTED}")
    return rest


def _parse(data: bytes, name: str) -> Any:
    """Return the JSON of data. Raises UsageError, and _CutOffError where the end is missing."""
    text = data.decode(errors="replace")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            raise _CutOffError from None
        raise UsageError(
            f"receipt: {name} is no receipt: line {error.lineno}: {error.msg}; {EXPECTED}"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets nested as deep
        raise UsageError(f"receipt: {name} is no receipt; {EXPECTED}") from None


def _last_of(first: bytes, file: IO[bytes], name: str) -> Found:
    """Return the last receipt among lines; a journal or a container may have put words before each."""
    last: Any = None
    count = 0
    is_cut_off = False
    for line in _lines(first, file):
        if b'"receipt"' not in line and b'"outcome"' not in line:
            continue
        at = line.find(b"{")
        try:
            document = _parse(line[at:], name) if at >= 0 else None
        except _CutOffError:
            is_cut_off = True
            continue
        except UsageError:
            continue
        if isinstance(document, dict) and isinstance(document.get("receipt"), dict):
            document = document["receipt"]
        if isinstance(document, dict) and "outcome" in document:
            last, count, is_cut_off = document, count + 1, False
    if last is None and is_cut_off:
        raise _CutOffError
    if last is None:
        raise UsageError(f"receipt: {name} has no receipt; {EXPECTED}")
    return Found(receipt=check(last, name), count=count)


def _lines(first: bytes, file: IO[bytes]) -> Iterable[bytes]:
    yield first
    while line := file.readline(MAX_BYTES):
        yield line
