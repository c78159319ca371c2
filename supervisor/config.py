"""The configuration: flags over environment over file, every value checked, every error one line.

A file is `lastcall.toml`, or `[tool.lastcall]` of a `pyproject.toml`; in the environment a key is
`LASTCALL_` and its name in capitals, nested keys joined by a double underscore.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from lastcall.supervisor.errors import ConfigError, UsageError
from lastcall.worker.base import variables
from lastcall.worker.base.budget import DEFAULT_GRACE, Shares
from lastcall.worker.base.variables import NOT_OPTION_PREFIXES, NOT_OPTIONS, PREFIX

FILES = ("lastcall.toml", "pyproject.toml")

# Where the validator's own words name things that no user has heard of.
SAID_BETTER = {"missing": "more values", "model_type": "a table", "model_attributes_type": "a table"}

Seconds = Annotated[float, Field(gt=0, le=10_000_000, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, le=10_000_000, allow_inf_nan=False)]


def _http(value: str) -> str:
    if value == "off":
        return value
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError("expected HOST:PORT or off")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stop(_Section):
    """Reserved shares of grace, in seconds; each shrinks in proportion when grace is short."""

    fence: Seconds = 2
    close: Seconds = 25
    terminate: Seconds = 5
    kill: Seconds = 5
    companion: Seconds = 5

    @property
    def shares(self) -> Shares:
        """Those of one worker's stop; the whole stop's have the companion's as well, if there is one."""
        return Shares(fence=self.fence, close=self.close, terminate=self.terminate, kill=self.kill)


class Start(_Section):
    """`timeout`: seconds until registered. `stagger`: seconds between the starts of livekit workers."""

    timeout: Seconds = 120
    stagger: SecondsOrZero = 0.5


def _url(*schemes: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in schemes or not parts.hostname:
            raise ValueError(f"expected {schemes[-1]}://HOST/")
        return value

    return check


def _backoff(value: tuple[float, float]) -> tuple[float, float]:
    first, cap = value
    if first > cap:
        raise ValueError("expected [first, cap] with first not above cap")
    return value


def _receipt(value: str) -> str:
    """Find out at the start, not at the end of a stop, that a receipt can't be written."""
    if not value:
        return value
    path = Path(value)
    if path.is_dir():
        raise ValueError("expected a file, this is a directory")
    if not path.parent.is_dir():
        raise ValueError(f"expected a file in a directory that exists; there is no {str(path.parent)!r}")
    # A regular file is replaced, which its directory has to allow; anything else is written to.
    in_the_way = path if path.exists() and not path.is_file() else path.parent
    if not os.access(in_the_way, os.W_OK):
        raise ValueError(f"expected a file that can be written; {str(in_the_way)!r} can't be")
    return value


class Restart(_Section):
    """`intensity` failures in `period` seconds are borne; `backoff` is the first step and the cap."""

    intensity: Annotated[int, Field(ge=0, le=1000)] = 5
    period: Seconds = 60
    backoff: Annotated[tuple[SecondsOrZero, SecondsOrZero], AfterValidator(_backoff)] = (0.5, 30)


class Stall(_Section):
    """`beat`: seconds between two signs of life of a worker; after `misses` missed ones it is stalled.

    `grace`: seconds that a stalled worker's jobs have to end by themselves before it is killed.
    """

    beat: Seconds = 1
    misses: Annotated[int, Field(ge=2, le=1000)] = 5
    grace: SecondsOrZero = 30


class Reload(_Section):
    """`max_surge`: workers that are started beside the old ones at a time.

    `settle`: seconds that an opaque worker has to stay up to count as one that works.
    """

    max_surge: Annotated[int, Field(ge=1, le=1000)] = 1
    settle: SecondsOrZero = 1


class Recycle(_Section):
    """When a worker is replaced as in a reload; 0 is off. Seconds, jobs begun, megabytes of its own."""

    max_age: SecondsOrZero = 0
    max_jobs: Annotated[int, Field(ge=0)] = 0
    max_rss_mb: Annotated[int, Field(ge=0)] = 0


class JobLimits(_Section):
    """`max_running`: jobs that one worker accepts at a time; 0 is no limit."""

    max_running: Annotated[int, Field(ge=0)] = 0


class Inworld(_Section):
    """The pool of Inworld connections that all jobs of the machine share."""

    enabled: bool = False
    api_key_file: str = ""
    max_connections: Annotated[int, Field(ge=1, le=1000)] = 20
    max_contexts: Annotated[int, Field(ge=1, le=1000)] = 5
    idle_connection_timeout: Seconds = 300
    acquire_timeout: Seconds = 30
    ws_url: Annotated[str, AfterValidator(_url("ws", "wss"))] = "wss://api.inworld.ai/"
    base_url: Annotated[str, AfterValidator(_url("http", "https"))] = "https://api.inworld.ai/"


class Config(BaseSettings):
    """Every option of `lastcall run`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, env_ignore_empty=True
    )

    target: str = ""
    command: list[str] = []
    workers: Annotated[int, Field(ge=1, le=1000)] = 1
    grace: Seconds = DEFAULT_GRACE
    http: Annotated[str, AfterValidator(_http)] = "127.0.0.1:8080"
    control: str = "auto"
    receipt: Annotated[str, AfterValidator(_receipt)] = ""
    log_format: Literal["auto", "json", "console"] = "auto"
    env_file: str = ""
    stop: Stop = Stop()
    start: Start = Start()
    restart: Restart = Restart()
    stall: Stall = Stall()
    reload: Reload = Reload()
    recycle: Recycle = Recycle()
    jobs: JobLimits = JobLimits()
    inworld: Inworld = Inworld()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The file's values come in by `load`, already apart from the flags.
        return (init_settings,)

    @property
    def shares(self) -> Shares:
        """The reserved shares of a whole stop."""
        return replace(self.stop.shares, companion=self.stop.companion if self.inworld.enabled else 0.0)

    @property
    def is_opaque(self) -> bool:
        return bool(self.command)


class _Environment(EnvSettingsSource):
    """The environment as a source that can be asked for its values alone."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(Config)
        self.env_vars = {name.lower(): value for name, value in environ.items() if value != ""}


def load(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    *,
    file: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Config:
    """Return the configuration; `defaults` stand in for what nobody has set.

    Raises UsageError for a bad flag, ConfigError for whatever else is bad.
    """
    path, from_file = _read_file(file or environ.get(variables.CONFIG) or None)
    from_environment = _from_environment(environ)
    given = {name: value for name, value in flags.items() if value is not None}
    if "target" in given:
        from_file.pop("command", None), from_environment.pop("command", None)
    if "command" in given:
        from_file.pop("target", None), from_environment.pop("target", None)
    # Each layer is checked on its own first, so that an error names the layer it is in.
    _check(from_file, where=str(path))
    _check(from_environment, where="environment")
    _check(given, where="", error=UsageError)
    return Config(**_merge(_merge(_merge(dict(defaults or {}), from_file), from_environment), given))


def warnings(environ: Mapping[str, str]) -> list[str]:
    """Return a line for each LASTCALL_ variable that means nothing, with the nearest one that would."""
    known = set(_variables(Config))
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


def environment_of(path: str) -> dict[str, str]:
    """Read an env file. Raises ConfigError when it can't be read."""
    if not path:
        return {}
    from dotenv import dotenv_values

    if not Path(path).is_file():
        raise ConfigError(f"env_file: no file {path!r}; expected KEY=value lines")
    try:
        return {name: value for name, value in dotenv_values(path).items() if value is not None}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"env_file: {path!r} can't be read: {error}") from error


def _variables(model: type[BaseModel], prefix: str = PREFIX) -> Iterator[str]:
    for name, field in model.model_fields.items():
        full = prefix + name.upper()
        yield full
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _variables(field.annotation, full + "__")


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    known = set(_variables(Config))
    try:
        # An unknown variable is a warning, nested or not; `warnings` says so.
        return _Environment({name: value for name, value in environ.items() if name in known})()
    except Exception as error:  # SettingsError, whose own base differs between versions
        raise ConfigError(f"environment: {error}") from error


def _read_file(name: str | None) -> tuple[Path, dict[str, Any]]:
    if name is not None:
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"no configuration file {name!r}; write one, or leave --config out")
        return path, _parse(path)
    for candidate in FILES:
        path = Path(candidate)
        if path.is_file():
            values = _parse(path)
            if values:
                return path, values
    return Path(FILES[0]), {}


def _parse(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        if path.name == "pyproject.toml" and not isinstance(error, tomllib.TOMLDecodeError):
            return {}
        raise ConfigError(f"{path}: not TOML: {error}") from error
    if path.name == "pyproject.toml":
        tool = values.get("tool", {}).get("lastcall", {})
        return dict(tool)
    return values


def _check(values: dict[str, Any], *, where: str, error: type[Exception] = ConfigError) -> None:
    try:
        Config(**values)
    except ValidationError as failure:
        raise error(_one_line(failure, where)) from None


def _one_line(failure: ValidationError, where: str) -> str:
    problem = failure.errors(include_url=False)[0]
    # The type of a union member or a list index may be in the location; the user wrote none of them.
    keys = [str(part) for part in problem["loc"]]
    name = ".".join(keys)
    if where == "environment":
        name = PREFIX + "__".join(keys).upper()
    prefix = f"{where}: " if where else ""
    if problem["type"] == "extra_forbidden":
        return f"{prefix}unknown key {name!r}{_nearest(keys)}"
    option = name if where else f"--{name.replace('_', '-')}"
    expected = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = SAID_BETTER.get(problem["type"], expected.partition(", unable to parse")[0])
    return f"{prefix}{option}: got {problem['input']!r}, expected {expected.removeprefix('expected ')}"


def _nearest(keys: list[str]) -> str:
    model: type[BaseModel] = Config
    for key in keys[:-1]:
        annotation = model.model_fields[key].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    near = difflib.get_close_matches(keys[-1], model.model_fields, n=1)
    known = ", ".join(model.model_fields)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {known}"


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def runtime_directory() -> Path:
    """Return where control sockets of this user live: the session's runtime directory, else one in /tmp."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "lastcall" if base else Path(f"/tmp/lastcall-{os.getuid()}")
