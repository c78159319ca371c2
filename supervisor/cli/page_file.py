"""The option `--html`, and the file that it names."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lastcall.supervisor.config.paths import working_directory
from lastcall.supervisor.config.user_files import words_of
from lastcall.supervisor.config.values import check_writable
from lastcall.supervisor.errors import UsageError

STANDARD_OUTPUT = "-"
PageFile = Annotated[
    str | None,
    typer.Option("--html", metavar="OUT", help="Write one page for a browser there; - is standard output."),
]


def checked(out: str | None, option: str = "--html") -> None:
    """Refuse a file that could not be written later. Raises UsageError."""
    if out is None or out == STANDARD_OUTPUT:
        return
    place = working_directory() / out
    if not os.path.isdir(place.parent):
        raise UsageError(f"{option}: no directory {str(place.parent)!r}; make it first")
    try:
        check_writable(str(place))
    except ValueError as error:
        raise UsageError(f"{option}: got {out!r}, {error}") from error


def write(out: str, text: str, option: str = "--html") -> None:
    """Write a file, or standard output for `-`. Raises UsageError."""
    if out == STANDARD_OUTPUT:
        sys.stdout.buffer.write(text.encode())
        sys.stdout.flush()
        return
    try:
        Path(out).write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"{option}: {out!r} can't be written: {words_of(error)}") from error
