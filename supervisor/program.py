"""Configuration and environment, read at the start and at each reload, and the launcher made from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lastcall.supervisor import config as configuration
from lastcall.supervisor.config import Config
from lastcall.supervisor.errors import ConfigError
from lastcall.supervisor.inworld_broker import Companion
from lastcall.supervisor.inworld_endpoint import key_of
from lastcall.supervisor.processes.launch import Launcher
from lastcall.supervisor.processes.reaper import Reaper
from lastcall.worker.base.settings import WorkerSettings

# The supervisor itself was set up by these keys: a reload keeps the old value, and logs that it does.
KEPT_BY_A_RELOAD = ("http", "control", "log_format", "inworld")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Makes launchers. `reread` returns the configuration as it is now, and may raise ConfigError.

    `settings` are those of the workers that no option sets; `write_output` and `write_errors` take the lines
    of the workers.
    """

    supervisor_id: str
    environment: Mapping[str, str]
    reread: Callable[[], Config]
    reaper: Reaper
    coloured: bool
    prefixes: bool
    settings: WorkerSettings
    write_output: Callable[[bytes], None]
    write_errors: Callable[[bytes], None]
    companion: Companion | None
    log: Any

    def launcher(self, config: Config) -> Launcher:
        """Return the launcher of workers for a configuration. Raises ConfigError for a bad env_file."""
        environment: Mapping[str, str] = environment_of(self.environment, config)
        if self.companion is not None:
            environment = self.companion.environment_for_workers(environment)
        settings = replace(
            self.settings,
            grace=config.grace,
            shares=config.shares,
            beat=config.stall.beat,
            max_running=config.jobs.max_running,
            coloured=self.coloured,
        )
        return Launcher(
            target=config.target,
            arguments=tuple(config.args),
            command=tuple(config.command),
            supervisor_id=self.supervisor_id,
            environment=environment,
            settings=settings,
            reaper=self.reaper,
            prefixes=self.prefixes,
            lifeline=None if self.companion is None else self.companion.lifeline,
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
            name: getattr(current, name)
            for name in KEPT_BY_A_RELOAD
            if getattr(new, name) != getattr(current, name)
        }
        for name, value in kept.items():
            self.log.warning(
                "takes effect at the next restart", key=name, still=value, new=getattr(new, name)
            )
        config = new.model_copy(update=kept)
        launcher = self.launcher(config)
        if self.companion is not None:
            self.companion.set_key(key_of(config.inworld, environment_of(self.environment, config)))
        return config, launcher


def environment_of(environment: Mapping[str, str], config: Config) -> dict[str, str]:
    """Return the environment with the variables of the env_file. Raises ConfigError for a bad env_file."""
    return {**environment, **configuration.environment_of(config.env_file)}
