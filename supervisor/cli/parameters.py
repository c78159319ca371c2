"""Parameters of verbs that are options of `lastcall run`, made from the definitions of the options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from lastcall.supervisor.config.options import Config, flags

_TARGET = typer.Argument(metavar="TARGET", help=Config.model_fields["target"].description)
Target = Annotated[str, _TARGET]
OptionalTarget = Annotated[str | None, _TARGET]
# The one option of `run` that is no key of the file.
CONFIG_FILE_DEFAULT = "lastcall.toml, or [tool.lastcall] of pyproject.toml"
ConfigFile = Annotated[
    str | None, typer.Option(metavar="FILE", help=f"Configuration.  [{CONFIG_FILE_DEFAULT}]")
]

Watch = Annotated[
    list[str] | None,
    typer.Option(
        "--watch",
        metavar="GLOB",
        help="More files that reload, as in 'prompts/**/*.md'; may be given again.",
    ),
]


def help_of(name: str, default: object = None) -> str:
    """Return the help of an option; a `default` is shown in place of the default in the definition."""
    field = Config.model_fields[name]
    shown = field.default if default is None else default
    if isinstance(shown, float):
        shown = f"{shown:g}"
    auto = flags()[name].auto
    if auto and shown == "auto":
        shown = f"auto: {auto}"
    return f"{field.description}  [{shown}]" if shown else str(field.description)


def with_run_options(
    *, without: frozenset[str] = frozenset(), defaults: Mapping[str, object] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a verb the options of `run` as parameters, in the place of its parameter `flags`.

    The verb gets the values in `flags`, by the options' names; None stands for an option that is not given.
    Values stay text: the configuration checks them, in the same words for each source. The help shows
    `defaults` of a verb in place of those of `run`.
    """
    shown = dict(defaults or {})
    generated = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(
                    f"--{name.replace('_', '-')}",
                    *([flag.short] if flag.short else []),
                    metavar=flag.metavar,
                    help=help_of(name, shown.get(name)),
                ),
            ],
        )
        for name, flag in flags().items()
        if name not in without
    ]

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(verb)
        def called(**given: Any) -> Any:
            values = {each.name: given.pop(each.name) for each in generated}
            return verb(flags=values, **given)

        signature = inspect.signature(verb, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for each in signature.parameters.values():
            parameters += generated if each.name == "flags" else [each.replace(kind=each.KEYWORD_ONLY)]
        # typer reads the parameters of a verb from these two.
        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # as inspect documents
        called.__annotations__ = {each.name: each.annotation for each in parameters}
        return called

    return decorate
