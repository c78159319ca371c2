"""The env file: KEY=value lines that are added to the workers' environment."""

from __future__ import annotations

import io

from lastcall.supervisor.config.user_files import read_text
from lastcall.supervisor.errors import ConfigError, Unreadable


def environment_of(path: str, *, again: bool = False) -> dict[str, str]:
    """Return the variables of an env file; an empty path stands for no file. Raises ConfigError.

    Blocks, as `read_text` does; `again` means the same there.
    """
    if not path:
        return {}
    from dotenv import dotenv_values

    try:
        text = read_text(path, again=again)
    except Unreadable as error:
        if error.is_absent:
            raise ConfigError(f"env_file: no file {path!r}; expected KEY=value lines") from error
        raise ConfigError(f"env_file: {path!r} {error}; expected KEY=value lines") from error
    found = dotenv_values(stream=io.StringIO(text))
    values = {name: value for name, value in found.items() if value is not None}
    for name, value in values.items():
        if not name or "=" in name or "\0" in name + value:
            raise ConfigError(
                f"env_file: {path!r}: {name!r} can't be set; expected KEY=value lines without NUL bytes"
            )
    return values
