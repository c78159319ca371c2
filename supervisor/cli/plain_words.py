"""The parameters of verbs as data, and command lines that need no typer.

typer takes longer than the whole rest of `lastcall status`, because it loads pydantic. So a command line
without anything special is read here. Where a word is wrong or abbreviated, or the help is asked for, `read`
returns nothing, and typer reads the same words by the same definitions (`command_line`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, get_args, get_origin

from lastcall.worker.base.records import dataclass

# A word that a shell offers after Tab, and the text that zsh and fish show beside the word.
Word = tuple[str, str]
# Returns the words for an argument, from the values of the parameters before it.
Completion = Callable[[dict[str, Any]], list[Word]]


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a verb. Without `names` it is spelt as the parameter is."""

    names: tuple[str, ...] = ()
    metavar: str | None = None
    help: str | None = None


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a verb: a word that belongs to no option."""

    metavar: str
    help: str | None = None
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class _Parameter:
    name: str
    kind: Any
    is_many: bool
    is_needed: bool


# The parameter by which a verb gets what the command line is read for.
SESSION = "session"


def read(verb: Callable[..., Any], words: list[str]) -> dict[str, Any] | None:
    """Return the values of a verb's parameters as far as they are given; None where typer has to read."""
    options, arguments = _parameters(verb)
    needed = {each.name for each in [*options.values(), *arguments] if each.is_needed}
    values: dict[str, Any] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        text: str | None
        if word.startswith("-") and word != "-":
            name, has_value, text = word.partition("=")
            parameter = options.get(name)
            if parameter is None or (has_value and (parameter.kind is bool or not name.startswith("--"))):
                return None
            if not has_value:
                text = "true" if parameter.kind is bool else left.pop(0) if left else None
        elif arguments:
            parameter, text = arguments.pop(0), word
        else:
            return None
        value = None if text is None else _value(parameter.kind, text)
        if value is None:
            return None
        values[parameter.name] = [*values.get(parameter.name, []), value] if parameter.is_many else value
    return values if needed <= values.keys() else None


def _parameters(verb: Callable[..., Any]) -> tuple[dict[str, _Parameter], list[_Parameter]]:
    options: dict[str, _Parameter] = {}
    arguments = []
    for each in inspect.signature(verb, eval_str=True).parameters.values():
        if each.name == SESSION:
            continue
        hint, *metadata = get_args(each.annotation)
        kinds = [kind for kind in get_args(hint) if kind is not type(None)] if _is_union(hint) else [hint]
        is_many = get_origin(kinds[0]) is list
        kind = get_args(kinds[0])[0] if is_many else kinds[0]
        parameter = _Parameter(each.name, kind, is_many, each.default is each.empty)
        for given in metadata:
            if isinstance(given, Option):
                names = given.names or (f"--{each.name.replace('_', '-')}",)
                options |= dict.fromkeys(names, parameter)
            elif isinstance(given, Argument):
                arguments.append(parameter)
    return options, arguments


def _is_union(hint: Any) -> bool:
    return isinstance(hint, UnionType)


def _value(kind: Any, text: str) -> Any:
    """Return a value of one of the four types; None for a text that typer may refuse."""
    if kind is bool:
        return True
    if kind is str:
        return text
    digits = text.replace(".", "", 1) if kind is float else text
    return kind(text) if digits.isascii() and digits.isdigit() else None
