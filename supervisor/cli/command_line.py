"""The frame that all verbs share: the root of the command line, and its errors in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from lastcall.supervisor.cli import examples
from lastcall.supervisor.errors import UsageError

HELP = "Run LiveKit agent workers so that a stop cuts no call."

# Newer versions of typer bundle click, so the class is taken from a name that typer exports.
CommandLineError: Any = typer.BadParameter.__base__


def new() -> typer.Typer:
    """Return a command line without verbs."""
    app = typer.Typer(help=HELP, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(_root)
    return app


def add(app: typer.Typer, name: str, verb: Callable[..., Any], *, help: str | None = None) -> None:
    """Add one verb with its examples; without `help` the docstring of the verb is its help."""
    app.command(name, help=help, epilog=examples.epilog(name))(verb)


def read(app: typer.Typer, arguments: list[str], session: object) -> int:
    """Run one verb with the session as the object of its context; return its exit code. Raises UsageError."""
    try:
        result = typer.main.get_command(app).main(
            args=arguments,
            prog_name="lastcall",
            standalone_mode=False,
            obj=session,
        )
    except CommandLineError as error:
        message = error.format_message().rstrip(".")
        end = "" if message.endswith("?") else "."
        where = error.ctx.command_path if error.ctx else "lastcall"
        raise UsageError(f"{message}{end} See {where} --help.") from None
    except typer.Abort:
        return 130
    return int(result or 0)


def _show_version(wanted: bool) -> None:
    if wanted:
        from lastcall.supervisor.receipt import versions

        print(", ".join(f"{name} {number}" for name, number in versions().items()))
        raise typer.Exit(0)


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print versions and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Have the verbs share one root."""
