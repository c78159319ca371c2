"""Types of option values with checks that pydantic lacks. Each error text says what was expected."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

# Ours: 115 days. A deadline that far away is as good as none, and no clock arithmetic overflows.
LONGEST_SECONDS = 10_000_000

Seconds = Annotated[float, Field(gt=0, le=LONGEST_SECONDS, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, le=LONGEST_SECONDS, allow_inf_nan=False)]


def _check_address(value: str) -> str:
    if value == "off":
        return value
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError("expected HOST:PORT or off")
    return value


def _check_backoff(value: tuple[float, float]) -> tuple[float, float]:
    first, cap = value
    if first > cap:
        raise ValueError("expected [first, cap] with first not above cap")
    return value


def _check_writable(value: str) -> str:
    """Find out at the start, not at the end of a stop, that a receipt can't be written."""
    if not value:
        return value
    path = Path(value)
    if path.is_dir():
        raise ValueError("expected a file, this is a directory")
    if not path.parent.is_dir():
        raise ValueError(f"expected a file in a directory that exists; there is no {str(path.parent)!r}")
    # Writing replaces a regular file, so the directory has to be writable. A pipe or device is written to.
    needed = path if path.exists() and not path.is_file() else path.parent
    if not os.access(needed, os.W_OK):
        raise ValueError(f"expected a file that can be written; {str(needed)!r} can't be")
    return value


def _check_url(value: str, schemes: tuple[str, str]) -> str:
    parts = urlsplit(value)
    if parts.scheme not in schemes or not parts.hostname:
        raise ValueError(f"expected {schemes[-1]}://HOST/")
    return value


HttpAddress = Annotated[str, AfterValidator(_check_address)]
Backoff = Annotated[tuple[SecondsOrZero, SecondsOrZero], AfterValidator(_check_backoff)]
WritableFile = Annotated[str, AfterValidator(_check_writable)]
WebSocketUrl = Annotated[str, AfterValidator(lambda value: _check_url(value, ("ws", "wss")))]
HttpUrl = Annotated[str, AfterValidator(lambda value: _check_url(value, ("http", "https")))]
