"""Parameters of verbs that are options of `lastcall run`, made from the definitions of the options."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from lastcall.supervisor.cli.plain_words import Argument, Option
from lastcall.supervisor.config.options import Config, flags
from lastcall.supervisor.errors import UsageError
from lastcall.worker.base import target_form

_TARGET = Argument("TARGET", Config.options["target"].description)
OptionalTarget = Annotated[str | None, _TARGET]
Module = Annotated[str | None, Option(("-m",), "MODULE", "TARGET as `python -m MODULE start` has it.")]
# The words that follow, as JSON: `given_in` makes the value of them before the command line is read.
Arguments = Annotated[str | None, Option(("--args",), "ARG…", "All that follows, for the program itself.")]
# The one option of `run` that is no key of the file.
CONFIG_FILE_DEFAULT = "lastcall.toml, or [tool.lastcall] of pyproject.toml"
ConfigFile = Annotated[str | None, Option(("--config",), "FILE", f"Configuration.  [{CONFIG_FILE_DEFAULT}]")]

Watch = Annotated[
    list[str] | None,
    Option(("--watch",), "GLOB", "More files that reload, as in 'prompts/**/*.md'; may be given again."),
]


def with_arguments(words: list[str]) -> list[str]:
    """Return a command line in which all words after --args are one value of it."""
    if target_form.ARGUMENTS not in words:
        return words
    at = words.index(target_form.ARGUMENTS)
    if "--" in words[:at]:  # a word of the command
        return words
    return [*words[: at + 1], json.dumps(words[at + 1 :])]


def arguments_of(value: str | None) -> list[str] | None:
    """Return the words that `with_arguments` joined."""
    return None if value is None else list(json.loads(value))


def target_of(target: str | None, module: str | None) -> str | None:
    """Return the target of either form. Raises UsageError for both at once."""
    if module is None:
        return target
    if target is not None:
        raise UsageError(f"both TARGET {target!r} and -m {module}: expected one; arguments go after --args")
    return f"{target_form.MODULE} {module}"


def needed_target(target: str | None, module: str | None) -> str:
    """Return the target of either form. Raises UsageError for both at once, and for none."""
    found = target_of(target, module)
    if found is None:
        raise UsageError(f"Missing argument 'TARGET': expected {target_form.FORMS}, as in: agent.py")
    return found


def help_of(name: str, default: object = None) -> str:
    """Return the help of an option; a `default` is shown in place of the default in the definition."""
    option = Config.options[name]
    shown = option.default if default is None else default
    if isinstance(shown, float):
        shown = f"{shown:g}"
    auto = flags()[name].auto
    if auto and shown == "auto":
        shown = f"auto: {auto}"
    return f"{option.description}  [{shown}]" if shown else option.description


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
                Option(
                    (f"--{name.replace('_', '-')}", *([flag.short] if flag.short else [])),
                    flag.metavar,
                    help_of(name, shown.get(name)),
                ),
            ],
        )
        for name, flag in flags().items()
        if name not in without
    ]

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(verb)
        def called(**given: Any) -> Any:
            values = {each.name: given.pop(each.name, None) for each in generated}
            return verb(flags=values, **given)

        signature = inspect.signature(verb, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for each in signature.parameters.values():
            parameters += generated if each.name == "flags" else [each.replace(kind=each.KEYWORD_ONLY)]
        called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # as inspect documents
        return called

    return decorate
