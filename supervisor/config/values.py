"""Types of option values with checks that pydantic lacks. Each error text says what was expected."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo

from lastcall.supervisor.config.user_files import words_of
from lastcall.worker.base import target_form
from lastcall.worker.base.dial_checks import check_host, check_url

# Ours: 115 days. A deadline that far away is as good as none, and no clock arithmetic overflows.
LONGEST_SECONDS = 10_000_000
# Characters of a value in an error. Ours: an error is a line to be read.
MOST_SHOWN = 200
# A key of the context of a validation: whether the values are for another machine than this one.
FOR_ELSEWHERE = "for_elsewhere"

Seconds = Annotated[float, Field(gt=0, le=LONGEST_SECONDS, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, le=LONGEST_SECONDS, allow_inf_nan=False)]


def shown(value: Any) -> str:
    """Return a value as an error shows it: on one line, at most `MOST_SHOWN` characters."""
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    # A password may have any character that should have been escaped, so all in front of the last @ goes.
    text = re.sub("(://).*@", r"\1…@", text)
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "…"


def check_text(value: Any) -> None:
    """Refuse text that can't be a path, a name or an argument of a program. Raises ValueError."""
    for each in value if isinstance(value, list | tuple) else (value,):
        if isinstance(each, str) and "\0" in each:
            raise ValueError("expected text without a NUL byte")


def check_number(value: Any) -> None:
    """Refuse booleans where numbers belong: pydantic takes true for 1. Raises ValueError."""
    for each in value if isinstance(value, list | tuple) else (value,):
        if isinstance(each, bool):
            raise ValueError("expected a number, not a boolean")


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


def _check_writable_here(value: str, info: ValidationInfo) -> str:
    return value if (info.context or {}).get(FOR_ELSEWHERE) else check_writable(value)


def _check_url(value: str, schemes: tuple[str, str]) -> str:
    check_url(value, schemes)
    return value


TargetText = Annotated[str, AfterValidator(_check_target)]
HttpAddress = Annotated[str, AfterValidator(_check_address)]
Backoff = Annotated[tuple[SecondsOrZero, SecondsOrZero], AfterValidator(_check_backoff)]
WritableFile = Annotated[str, AfterValidator(_check_writable_here)]
WebSocketUrl = Annotated[str, AfterValidator(lambda value: _check_url(value, ("ws", "wss")))]
HttpUrl = Annotated[str, AfterValidator(lambda value: _check_url(value, ("http", "https")))]
