"""The env file: KEY=value lines that are added to the workers' environment."""

from __future__ import annotations

from pathlib import Path

from lastcall.supervisor.errors import ConfigError


def environment_of(path: str) -> dict[str, str]:
    """Return the variables of an env file; an empty path stands for no file. Raises ConfigError."""
    if not path:
        return {}
    from dotenv import dotenv_values

    if not Path(path).is_file():
        raise ConfigError(f"env_file: no file {path!r}; expected KEY=value lines")
    try:
        return {name: value for name, value in dotenv_values(path).items() if value is not None}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"env_file: {path!r} can't be read: {error}") from error
