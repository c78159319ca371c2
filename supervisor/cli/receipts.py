"""`lastcall receipt`: shows a stop that is over."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lastcall.supervisor.cli import command_line
from lastcall.supervisor.cli.page_file import PageFile, checked, write
from lastcall.supervisor.errors import UsageError

RECEIPT_HELP = """Show a stop as a picture: its phases, jobs and deadlines.

FILE is what --receipt has written, or a log, of which the last receipt counts. - is standard input.
"""


def add_to(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    command_line.add(app, "receipt", _receipt, help=RECEIPT_HELP)


def _receipt(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A receipt, a log, or - for standard input.")],
    html: PageFile = None,
) -> None:
    from lastcall.supervisor.picture import reading, timeline

    checked(html)
    if file == reading.STANDARD_INPUT and sys.stdin.isatty():
        raise UsageError("receipt: - is standard input, a terminal here; expected a file or a pipe")
    found = reading.read(file)
    picture = timeline.lay_out(found.receipt)
    if html is not None:
        from lastcall.supervisor.picture import page

        title = "A stop of lastcall" if file == reading.STANDARD_INPUT else f"Receipt {Path(file).name}"
        write(html, page.page(title, [page.section_of(picture)]))
        return
    from rich.console import Console

    from lastcall.supervisor.picture.terminal import StopPicture

    # Names of rooms may have any character, and the terminal's encoding need not.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a TextIOWrapper in this process
    console = Console(highlight=False)
    if found.count > 1:
        console.print(f"the last of {found.count} receipts", style="dim")
    console.print(StopPicture(picture))
