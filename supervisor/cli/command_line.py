"""The frame that all verbs share: the root of the command line, and its errors in one line.

typer is imported here, and where verbs use it themselves. `plain_words` reads most command lines without.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer

from lastcall.supervisor.cli import examples
from lastcall.supervisor.cli.plain_words import SESSION, Argument, Completion, Option, Word
from lastcall.supervisor.errors import UsageError

HELP = "Run LiveKit agent workers so that a stop cuts no call."

# The options that typer adds.
FOR_COMPLETION = ("--install-completion", "--show-completion")

# Newer versions of typer bundle click, so the class is taken from a name that typer exports.
CommandLineError: Any = typer.BadParameter.__base__


def new() -> typer.Typer:
    """Return a command line without verbs."""
    app = typer.Typer(help=HELP, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(_root)
    return app


def add(app: typer.Typer, name: str, verb: Callable[..., Any], *, help: str | None = None) -> None:
    """Add one verb with its examples; without `help` the docstring of the verb is its help.

    A parameter `session` of the verb gets the object that `read` is given.
    """

    def called(context: typer.Context, **values: Any) -> Any:
        return verb(**values, **({SESSION: context.obj} if has_session else {}))

    parameters = list(inspect.signature(verb, eval_str=True).parameters.values())
    has_session = any(each.name == SESSION for each in parameters)
    shown = [_for_typer(each) for each in parameters if each.name != SESSION]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    # typer reads the parameters of a verb from these two, and the help from the docstring.
    called.__signature__ = inspect.Signature([context, *shown])  # type: ignore[attr-defined]  # as inspect documents
    called.__annotations__ = {each.name: each.annotation for each in (context, *shown)}
    called.__doc__ = verb.__doc__
    app.command(name, help=help, epilog=examples.epilog(name))(called)


def _for_typer(parameter: inspect.Parameter) -> inspect.Parameter:
    shown = parameter.annotation
    for given in get_args(shown)[1:]:
        if isinstance(given, Option):
            shown = Annotated[
                get_args(shown)[0], typer.Option(*given.names, metavar=given.metavar, help=given.help)
            ]
        elif isinstance(given, Argument):
            words = None if given.completion is None else _words_of(given.completion)
            shown = Annotated[
                get_args(shown)[0],
                typer.Argument(metavar=given.metavar, help=given.help, autocompletion=words),
            ]
    return parameter.replace(annotation=shown, kind=parameter.KEYWORD_ONLY)


def _words_of(completion: Completion) -> Callable[[typer.Context], list[Word]]:
    def words(context: typer.Context) -> list[Word]:
        return completion(context.params)

    return words


def read(app: typer.Typer, arguments: list[str], session: object) -> int:
    """Run one verb with the session as the object of its context; return its exit code. Raises UsageError."""
    option, is_long, _ = (arguments[0] if arguments else "").partition("=")
    is_completion = option in FOR_COMPLETION
    if is_completion and (is_long or arguments[1:]):
        # typer would ignore the name of a shell, and use the shell that it runs in. typer takes a name where
        # it is told to find out none (`get_completion_inspect_parameters` of typer/completion.py).
        os.environ["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
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
    except OSError as error:
        if not is_completion:
            raise
        raise UsageError(
            f"{option}: {error.filename}: {error.strerror}; --show-completion prints the script"
        ) from None
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
