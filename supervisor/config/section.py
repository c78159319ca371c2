"""A table of options: how definitions are read, and how a value of any source becomes one of the options.

A definition is a type, `Annotated` with a `Field`, further checks and whatever else. The default stands
behind the type, as in a dataclass. Text is read as the type wants it, because flags and variables are text.
pydantic would check the same, and took a fifth of the supervisor's start and of its memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, Self, dataclass_transform, get_args, get_origin, get_type_hints

from lastcall.worker.base.records import dataclass

# Words of a file or a variable, in any case, besides the booleans of TOML and JSON.
TRUE = frozenset({"1", "on", "t", "true", "y", "yes"})
FALSE = frozenset({"0", "off", "f", "false", "n", "no"})


class WrongValue(Exception):
    """A value that can't be taken: where it stands, and what was expected, which is empty for a wrong key."""

    def __init__(self, keys: tuple[str, ...], value: object, expected: str) -> None:
        super().__init__(keys, value, expected)
        self.keys = keys
        self.value = value
        self.expected = expected


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A description of an option, and bounds of its value; a bound that is None is none."""

    description: str = ""
    gt: float | None = None
    ge: float | None = None
    le: float | None = None


@dataclass(frozen=True, slots=True)
class OnlyHere:
    """A check that makes no sense for a configuration which another machine is to run with."""

    check: Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One definition: the type without its annotations, the default, and what was annotated."""

    annotation: Any
    default: Any
    metadata: tuple[Any, ...]

    @property
    def description(self) -> str:
        return "".join(each.description for each in self.metadata if isinstance(each, Field))


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Section:
    """Options that are one table of the file. A section's docstring is its line on the page."""

    options: ClassVar[Mapping[str, Option]] = {}
    # The names of the options that somebody has given a value.
    given: frozenset[str]

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True)
        named = {name: hint for name, hint in hints.items() if name not in Section.__annotations__}
        cls.options = {name: _option(hint, getattr(cls, name)) for name, hint in named.items()}

    def __init__(self, **values: Any) -> None:
        """Check the values, those of sections as tables or as sections. Raises WrongValue."""
        self._take(values, is_elsewhere=False)

    @classmethod
    def of(cls, values: Mapping[str, Any], *, is_elsewhere: bool = False) -> Self:
        """Return the section with these values, `is_elsewhere` for another machine. Raises WrongValue."""
        self = cls.__new__(cls)
        self._take(values, is_elsewhere=is_elsewhere)
        return self

    def changed(self, values: Mapping[str, Any]) -> Self:
        """Return a copy in which some options have other values, which are not checked."""
        copy = type(self).__new__(type(self))
        copy.__dict__.update(self.__dict__, **values)
        copy.__dict__["given"] = self.given | values.keys()
        return copy

    def _take(self, values: Mapping[str, Any], *, is_elsewhere: bool) -> None:
        taken = self.__dict__
        for name, option in self.options.items():
            if name in values:
                taken[name] = _checked((name,), option, values[name], is_elsewhere)
            else:
                taken[name] = list(option.default) if isinstance(option.default, list) else option.default
        for name in values:
            if name not in self.options:
                raise WrongValue((name,), values[name], "")
        taken["given"] = frozenset(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} can't be set: a configuration does not change")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.options)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.options)
        return f"{type(self).__name__}({values})"


def section_of(option: Option) -> type[Section] | None:
    """Return the section that an option of `Config` is; None for a single option."""
    kind = option.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _option(hint: Any, default: Any) -> Option:
    kind, *metadata = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    return Option(annotation=kind, default=default, metadata=tuple(metadata))


def _checked(keys: tuple[str, ...], option: Option, value: Any, is_elsewhere: bool) -> Any:
    section = section_of(option)
    if section is not None:
        if isinstance(value, section):
            return value
        if not isinstance(value, Mapping):
            raise WrongValue(keys, value, "a table")
        try:
            return section.of(value, is_elsewhere=is_elsewhere)
        except WrongValue as error:
            raise WrongValue(keys + error.keys, error.value, error.expected) from None
    try:
        _check_plain(option.annotation, value)
    except ValueError as error:
        raise WrongValue(keys, value, str(error)) from None
    return _converted(keys, option.annotation, option.metadata, value, is_elsewhere)


def _check_plain(kind: Any, value: Any) -> None:
    """Refuse text with a NUL, which no path, name or argument can have, and booleans that Python adds up."""
    for each in value if isinstance(value, list | tuple) else (value,):
        if isinstance(each, str) and "\0" in each:
            raise ValueError("expected text without a NUL byte")
        if isinstance(each, bool) and (kind in (int, float) or get_origin(kind) is tuple):
            raise ValueError("expected a number, not a boolean")


def _converted(
    keys: tuple[str, ...], kind: Any, metadata: Iterable[Any], value: Any, is_elsewhere: bool
) -> Any:
    """Return a value as the type has it, once each of the checks has passed it."""
    try:
        match get_origin(kind) or kind:
            case origin if origin is Literal:
                converted = _choice(get_args(kind), value)
            case origin if origin is list:
                converted = _many(keys, get_args(kind)[:1] * len(_list(value)), value, is_elsewhere)
            case origin if origin is tuple:
                converted = tuple(_many(keys, get_args(kind), value, is_elsewhere))
            case plain:
                converted = CONVERTERS[plain](value)
        for each in metadata:
            if isinstance(each, Field):
                _check_bounds(each, converted)
            elif isinstance(each, OnlyHere):
                converted = converted if is_elsewhere else each.check(converted)
            elif callable(each):
                converted = each(converted)
    except ValueError as error:
        raise WrongValue(keys, value, str(error)) from None
    return converted


def _check_bounds(field: Field, value: Any) -> None:
    if field.gt is not None and not value > field.gt:
        raise ValueError(f"expected greater than {field.gt}")
    if field.ge is not None and not value >= field.ge:
        raise ValueError(f"expected greater than or equal to {field.ge}")
    if field.le is not None and not value <= field.le:
        raise ValueError(f"expected less than or equal to {field.le}")


def _many(keys: tuple[str, ...], kinds: tuple[Any, ...], value: Any, is_elsewhere: bool) -> list[Any]:
    values = _list(value)
    if len(values) > len(kinds):
        raise ValueError(f"expected at most {len(kinds)} values, not {len(values)}")
    if len(values) < len(kinds):
        raise WrongValue((*keys, str(len(values))), value, "more values")
    converted = []
    for index, (kind, each) in enumerate(zip(kinds, values, strict=True)):
        option = _option(kind, None)
        at = (*keys, str(index))
        converted.append(_converted(at, option.annotation, option.metadata, each, is_elsewhere))
    return converted


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError("expected a list")
    return list(value)


def _choice(choices: tuple[str, ...], value: Any) -> Any:
    if value not in choices:
        *most, last = (repr(each) for each in choices)
        raise ValueError(f"expected {', '.join(most)} or {last}")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, str):
        digits, _, zeros = value.partition(".")
        try:
            return int(digits if value.isascii() and not zeros.strip("0") else "")
        except ValueError:
            raise ValueError("expected a valid integer") from None
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("expected a finite number")
        if not value.is_integer():
            raise ValueError("expected a valid integer, got a number with a fractional part")
    elif not isinstance(value, int):
        raise ValueError("expected a valid integer")
    return int(value)


def _float(value: Any) -> float:
    if not isinstance(value, str | int | float) or not str(value).isascii():
        raise ValueError("expected a valid number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError("expected a valid number") from None
    if not math.isfinite(number):
        raise ValueError("expected a finite number")
    return number


def _boolean(value: Any) -> bool:
    word = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).lower()
    if isinstance(value, str | int | float) and word in TRUE | FALSE:
        return word in TRUE
    raise ValueError("expected a valid boolean")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("expected a valid string")
    return value


CONVERTERS: dict[Any, Callable[[Any], Any]] = {
    int: _integer,
    float: _float,
    bool: _boolean,
    str: _text,
}
