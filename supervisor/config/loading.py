"""One configuration out of flags, environment and file, in this order of precedence; every error one line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lastcall.supervisor.config.options import Config
from lastcall.supervisor.config.section import Section, WrongValue, section_of
from lastcall.supervisor.config.sources import FILE_NAMES, read_environment, read_file
from lastcall.supervisor.config.values import shown
from lastcall.supervisor.errors import ConfigError, UsageError
from lastcall.worker.base import variables


def load(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    file: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Return the configuration; `defaults` stand in for options that nobody has set.

    Raises UsageError for a bad flag, ConfigError for a bad file or variable.
    """
    return Loader(flags, environ, file=file, defaults=defaults)()


class Loader:
    """Reads one configuration at the start, and again at each reload. The arguments are those of `load`.

    A reload raises ConfigError when the file that the configuration was read from is gone, or is a pipe that
    can't be read again. A call blocks, as `read_text` does. `for_elsewhere` leaves out the checks of paths in
    the configuration, because the machine that runs with it may have other paths.
    """

    def __init__(
        self,
        flags: Mapping[str, Any],
        environ: Mapping[str, str],
        *,
        file: str | None = None,
        defaults: Mapping[str, Any] | None = None,
        for_elsewhere: bool = False,
    ) -> None:
        self._flags = {name: value for name, value in flags.items() if value is not None}
        self._environ = environ
        self._name = file or environ.get(variables.CONFIG) or None
        self._named_by = "--config" if file else variables.CONFIG
        self._defaults = dict(defaults or {})
        self._for_elsewhere = for_elsewhere
        self._path: Path | None = None
        self._has_loaded = False

    @property
    def path(self) -> Path | None:
        """The file of the last call; None where there was no file."""
        return self._path

    def __call__(self) -> Config:
        """Return the configuration as it is now. Raises UsageError and ConfigError, as `load` does."""
        path, from_file = read_file(
            self._name, named_by=self._named_by, before=self._path, again=self._has_loaded
        )
        from_environment = read_environment(self._environ)
        given = self._flags
        # A target and a command exclude each other, so a flag for one also takes the other's value away.
        if "target" in given:
            from_file.pop("command", None), from_environment.pop("command", None)
        if "command" in given:
            from_file.pop("target", None), from_environment.pop("target", None)
        # Each source is checked alone first, so that an error names the source that the value is from.
        self._check(from_file, where=str(path or FILE_NAMES[0]))
        self._check(from_environment, where="environment")
        self._check(given, where="", error=UsageError)
        merged = _merge(_merge(_merge(self._defaults, from_file), from_environment), given)
        config = Config.of(merged, is_elsewhere=self._for_elsewhere)
        self._path, self._has_loaded = path, True
        return config

    def _check(self, values: dict[str, Any], *, where: str, error: type[Exception] = ConfigError) -> None:
        try:
            Config.of(values, is_elsewhere=self._for_elsewhere)
        except WrongValue as wrong:
            raise error(_one_line(wrong, where)) from None


def _one_line(wrong: WrongValue, where: str) -> str:
    keys = wrong.keys
    name = ".".join(keys)
    if where == "environment":
        name = variables.PREFIX + "__".join(keys).upper()
    prefix = f"{where}: " if where else ""
    if not wrong.expected:
        return f"{prefix}unknown key {name!r}{_nearest(keys)}"
    option = name if where else f"--{name.replace('_', '-')}"
    return f"{prefix}{option}: got {shown(wrong.value)}, expected {wrong.expected.removeprefix('expected ')}"


def _nearest(keys: tuple[str, ...]) -> str:
    section: type[Section] = Config
    for key in keys[:-1]:
        below = section_of(section.options[key])
        assert below is not None, "only a section can have an unknown key in it"
        section = below
    near = difflib.get_close_matches(keys[-1], section.options, n=1)
    known = ", ".join(section.options)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {known}"


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged
