"""Where values come from: a file, and the environment. Both give nested tables that nothing has checked yet.

A file is `lastcall.toml`, or `[tool.lastcall]` of a `pyproject.toml`. In the environment an option is
`LASTCALL_` and its name in capitals, with a double underscore between a section and an option of the section.
A list or a whole section is JSON. An empty variable and a JSON null count as not set.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin

from pydantic.fields import FieldInfo

from lastcall.supervisor.config.options import Config, Section
from lastcall.supervisor.errors import ConfigError
from lastcall.worker.base.variables import NOT_OPTION_PREFIXES, NOT_OPTIONS, PREFIX

# Looked for in the working directory, in this order.
FILE_NAMES = ("lastcall.toml", "pyproject.toml")


def section_of(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field of `Config` is; None for a single option."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the options that the environment sets. Raises ConfigError for a variable that is no JSON."""
    values: dict[str, Any] = {}
    for keys, field in _options(Config):
        name = _variable(keys)
        value: Any = environ.get(name, "")
        if not value:
            continue
        if section_of(field) is not None or get_origin(field.annotation) in (list, tuple):
            value = _decoded(name, value)
        if value is not None:
            _place(values, keys, value)
    return values


def read_file(name: str | None) -> tuple[Path, dict[str, Any]]:
    """Return the options of a file and its path; without a name, of the first file that is there and has any.

    Raises ConfigError when the named file is not there or a file is not TOML.
    """
    if name is not None:
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"no configuration file {name!r}; write one, or leave --config out")
        return path, _parse(path)
    for candidate in FILE_NAMES:
        path = Path(candidate)
        if path.is_file():
            values = _parse(path)
            if values:
                return path, values
    return Path(FILE_NAMES[0]), {}


def warnings(environ: Mapping[str, str]) -> list[str]:
    """Return a line for each LASTCALL_ variable that means nothing, with the nearest name that would."""
    known = {_variable(keys) for keys, _ in _options(Config)}
    lines = []
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name in known or name in NOT_OPTIONS:
            continue
        if name.startswith(NOT_OPTION_PREFIXES):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        lines.append(f"unknown environment variable {name}{hint}")
    return lines


def _options(
    model: type[Section], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Yield each section and option with its keys, a section in front of its options."""
    for name, field in model.model_fields.items():
        keys = (*above, name)
        yield keys, field
        section = section_of(field)
        if section is not None:
            yield from _options(section, keys)


def _variable(keys: tuple[str, ...]) -> str:
    return PREFIX + "__".join(keys).upper()


def _place(values: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Set one value in nested tables. A section that is no table stays, for the check to complain about."""
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            return
    values[keys[-1]] = value


def _decoded(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"environment: {name}: got {text!r}, expected JSON") from error


def _parse(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        if path.name == "pyproject.toml" and not isinstance(error, tomllib.TOMLDecodeError):
            return {}
        raise ConfigError(f"{path}: not TOML: {error}") from error
    if path.name == "pyproject.toml":
        return dict(values.get("tool", {}).get("lastcall", {}))
    return values
