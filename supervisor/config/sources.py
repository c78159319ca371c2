"""Where values come from: a file, and the environment. Both give nested tables that nothing has checked yet.

A file is `lastcall.toml`, or `[tool.lastcall]` of a `pyproject.toml`. In the environment an option is
`LASTCALL_` and its name in capitals, with a double underscore between a section and an option of the section.
A list or a whole section is JSON. An empty variable and a JSON null count as not set.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin

from lastcall.supervisor.config.options import Config
from lastcall.supervisor.config.section import Option, Section, section_of
from lastcall.supervisor.config.user_files import read_text
from lastcall.supervisor.config.values import shown
from lastcall.supervisor.errors import ConfigError, Unreadable
from lastcall.worker.base.variables import NOT_OPTION_PREFIXES, NOT_OPTIONS, PREFIX

# Looked for in the working directory, in this order.
FILE_NAMES = ("lastcall.toml", "pyproject.toml")
# The form of a variable, by the type of the option; None stands for a section.
JSON_FORMS: dict[object, str] = {
    list: 'a JSON list, as in ["node", "agent.js"]',
    tuple: "a JSON list, as in [0.5, 30]",
    None: 'a JSON object, as in {"fence": 2}',
}


def read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the options that the environment sets. Raises ConfigError for a variable that is no JSON."""
    values: dict[str, Any] = {}
    for keys, option in _options(Config):
        name = _variable(keys)
        value: Any = environ.get(name, "")
        if not value:
            continue
        kind = get_origin(option.annotation)
        if section_of(option) is not None or kind in (list, tuple):
            value = _decoded(name, value, JSON_FORMS[kind])
        if value is not None:
            _place(values, keys, value)
    return values


def read_file(
    name: str | None, *, named_by: str = "--config", before: Path | None = None, again: bool = False
) -> tuple[Path | None, dict[str, Any]]:
    """Return the options of a file and its path; without a name, of the first file that is there and has any.

    `named_by` is the option or variable that the name is from. `again` says that this is a reload, and
    `before` is the path that the reading before returned. Blocks, as `read_text` does. Raises ConfigError
    when a file is there and can't be read as a configuration, and when the file of `before` is gone.
    """
    if name is not None:
        values = _parse(Path(name), again=again)
        if values is None:
            lacks = "no [tool.lastcall] in" if os.path.exists(name) else "no configuration file"
            raise ConfigError(f"{named_by}: {lacks} {name!r}; write one, or leave {named_by} out")
        return Path(name), values
    without_options: Path | None = None
    for candidate in FILE_NAMES:
        path = Path(candidate)
        found = _parse(path, again=again)
        if found:
            return path, found
        if found is not None:
            without_options = without_options or path
        elif path == before:
            raise ConfigError(
                f"{path}: the configuration that was read from it is gone; put it back, or restart lastcall"
            )
    return without_options, {}


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


def _options(section: type[Section], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Option]]:
    """Yield each section and option with its keys, a section in front of its options."""
    for name, option in section.options.items():
        keys = (*above, name)
        yield keys, option
        below = section_of(option)
        if below is not None:
            yield from _options(below, keys)


def _variable(keys: tuple[str, ...]) -> str:
    return PREFIX + "__".join(keys).upper()


def _place(values: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Set one value in nested tables. A section that is no table stays, for the check to complain about."""
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            return
    values[keys[-1]] = value


def _decoded(name: str, text: str, form: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"environment: {name}: got {shown(text)}, expected {form}") from error


def _parse(path: Path, *, again: bool) -> dict[str, Any] | None:
    """Return the options of a file; None when it is not there, or is a pyproject.toml without a section."""
    try:
        values: Any = tomllib.loads(read_text(path, again=again))
    except Unreadable as error:
        if error.is_absent:
            return None
        raise ConfigError(f"{path} {error}; expected a configuration in TOML") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not TOML: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, and an integer that has too many digits
        raise ConfigError(f"{path}: not TOML: {error}") from error
    if path.name == "pyproject.toml":
        for key, whole in (("tool", "tool"), ("lastcall", "tool.lastcall")):
            if key not in values:
                return None
            values = values[key]
            if not isinstance(values, dict):
                raise ConfigError(f"{path}: {whole}: got {shown(values)}, expected a table")
    return dict(values)
