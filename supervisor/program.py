"""What a start is made from: configuration and environment, read at the beginning and at each reload."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import config as configuration
from .config import Config
from .errors import ConfigError
from .launch import Launcher
from .reaper import Reaper

# What the supervisor itself stands on; a reload keeps the old value and says so.
FIXED = ("http", "control", "log_format")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Makes launchers. `reread` returns the configuration as it is now, and may raise ConfigError.

    `settings` are more of them for the workers; `write_output` and `write_errors` take their lines.
    """

    supervisor_id: str
    environment: Mapping[str, str]
    reread: Callable[[], Config]
    reaper: Reaper
    coloured: bool
    prefixes: bool
    settings: Mapping[str, object]
    write_output: Callable[[bytes], None]
    write_errors: Callable[[bytes], None]
    log: Any

    def launcher(self, config: Config) -> Launcher:
        """Return what starts workers under a configuration. Raises ConfigError for a bad env_file."""
        environment = {**self.environment, **configuration.environment_of(config.env_file)}
        shares = config.stop.shares.within(config.grace)
        settings = {
            "drain": config.grace - shares.reserved,
            "close": shares.close,
            "beat": config.stall.beat,
            "max_running": config.jobs.max_running,
            "coloured": self.coloured,
            **self.settings,
        }
        return Launcher(
            target=config.target,
            command=tuple(config.command),
            supervisor_id=self.supervisor_id,
            environment=environment,
            settings=settings,
            reaper=self.reaper,
            prefixes=self.prefixes,
            write_output=self.write_output,
            write_errors=self.write_errors,
        )

    def read(self, current: Config) -> tuple[Config, Launcher]:
        """Read everything again. Raises ConfigError."""
        new = self.reread()
        if new.is_opaque != current.is_opaque:
            raise ConfigError(
                "a reload can't turn a target into a command or back; restart lastcall for that"
            )
        kept = {
            name: getattr(current, name) for name in FIXED if getattr(new, name) != getattr(current, name)
        }
        for name, value in kept.items():
            self.log.warning(
                "takes effect at the next restart", key=name, still=value, new=getattr(new, name)
            )
        config = new.model_copy(update=kept)
        return config, self.launcher(config)
