"""Types of option values, with their checks. Each error text says what was expected."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any

from lastcall.supervisor.config.section import Field, OnlyHere
from lastcall.supervisor.config.user_files import words_of
from lastcall.worker.base import target_form
from lastcall.worker.base.dial_checks import check_host, check_url

# Ours: 115 days. A deadline that far away is as good as none, and no clock arithmetic overflows.
LONGEST_SECONDS = 10_000_000
# Characters of a value in an error. Ours: an error is a line to be read.
MOST_SHOWN = 200

Seconds = Annotated[float, Field(gt=0, le=LONGEST_SECONDS)]
SecondsOrZero = Annotated[float, Field(ge=0, le=LONGEST_SECONDS)]


def shown(value: Any) -> str:
    """Return a value as an error shows it: on one line, at most `MOST_SHOWN` characters."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    # A password may have any character that should have been escaped, so all in front of the last @ goes.
    text = re.sub("(://).*@", r"\1…@", text)
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "…"


def _check_target(value: str) -> str:
    if target_form.is_too_long(value):
        raise ValueError(f"expected at most {target_form.MAX_BYTES} bytes of {target_form.FORMS}")
    return value


def _check_address(value: str) -> str:
    if value == "off":
        return value
    host, colon, port = value.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError("expected HOST:PORT or off")
    try:
        check_host(host.strip("[]"))
    except ValueError as error:
        raise ValueError(f"expected HOST:PORT or off; {error}") from error
    return value


def _check_backoff(value: tuple[float, float]) -> tuple[float, float]:
    first, cap = value
    if first > cap:
        raise ValueError("expected [first, cap] with first not above cap")
    return value


def _kind_of(path: Path) -> int:
    """Return the file type bits of a path; 0 when nothing is there. Raises ValueError for any other error.

    Not `Path.is_file()`: for a directory that may not be searched, or a name that is too long, that raises
    OSError before Python 3.14, and later says that nothing is there.
    """
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a file that can be written; {words_of(error)}") from error


def check_writable(value: str) -> str:
    """Find out at the start, not at the end of a stop, that a file can't be written. Raises ValueError."""
    if not value:
        return value
    path = Path(value)
    kind = _kind_of(path)
    if kind == stat.S_IFDIR:
        raise ValueError("expected a file, this is a directory")
    if _kind_of(path.parent) != stat.S_IFDIR:
        raise ValueError(f"expected a file in a directory that exists; there is no {str(path.parent)!r}")
    # Writing replaces a regular file, so the directory has to be writable. A pipe or device is written to.
    needed = path if kind and kind != stat.S_IFREG else path.parent
    if not os.access(needed, os.W_OK):
        raise ValueError(f"expected a file that can be written; {str(needed)!r} can't be")
    return value


def _check_url(value: str, schemes: tuple[str, str]) -> str:
    check_url(value, schemes)
    return value


TargetText = Annotated[str, _check_target]
HttpAddress = Annotated[str, _check_address]
Backoff = Annotated[tuple[SecondsOrZero, SecondsOrZero], _check_backoff]
WritableFile = Annotated[str, OnlyHere(check_writable)]
WebSocketUrl = Annotated[str, lambda value: _check_url(value, ("ws", "wss"))]
HttpUrl = Annotated[str, lambda value: _check_url(value, ("http", "https"))]
