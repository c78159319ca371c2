"""Configuration and environment, read at the start and at each reload, and the launcher made from them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, replace
from typing import Any

from lastcall.supervisor import config as configuration
from lastcall.supervisor.config import Config
from lastcall.supervisor.errors import ConfigError
from lastcall.supervisor.fleet.operations import Reread
from lastcall.supervisor.inworld_broker import Companion
from lastcall.supervisor.inworld_endpoint import check_way_out, key_of
from lastcall.supervisor.processes.image import Image
from lastcall.supervisor.processes.launch import Launcher, image_environment, worker_command
from lastcall.supervisor.processes.reaper import Reaper
from lastcall.worker.base.records import dataclass
from lastcall.worker.base.settings import WorkerSettings

# The supervisor itself was set up by these keys: a reload keeps the old value, and logs that it does.
KEPT_BY_A_RELOAD = ("http", "control", "log_format", "inworld")
# Seconds that a reload waits for the configuration, the env file and the API key together. Ours: each of them
# has 5 s (`user_files.READ_WITHIN`), and a file system that hangs is not bounded by that.
REREAD_WITHIN = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The result of reading for a reload. `wanted` has new values also for the keys that a reload keeps."""

    wanted: Config
    config: Config
    environment: Mapping[str, str]
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Makes launchers. `reread` returns the configuration as it is now, may block, and may raise ConfigError.

    `settings` are those of the workers that no option sets; `write_output` and `write_errors` take the lines
    of the workers. `known_pids` and `is_stopping` are for the images; `images` numbers them.
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
    known_pids: set[int]
    is_stopping: Callable[[], bool]
    log: Any
    images: Iterator[int] = field(default_factory=itertools.count)

    def launcher(self, config: Config, environment: Mapping[str, str], key: str) -> Launcher:
        """Return the launcher of workers for a configuration and the environment with its env_file.

        `key` is the Inworld key of the configuration; empty without a pool.
        """
        if self.companion is not None:
            environment = self.companion.environment_for_workers(environment, key)
        settings = replace(
            self.settings,
            grace=config.grace,
            shares=config.shares,
            beat=config.stall.beat,
            max_running=config.jobs.max_running,
            job_memory_limit=config.jobs.memory_mb << 20,
            finish=config.jobs.finish,
            handover=config.handover.settings,
            coloured=self.coloured,
        )
        image = None
        if config.start.image and not config.is_opaque:
            image = Image(
                worker_command(config.target, config.args),
                environment=image_environment(environment, self.supervisor_id, next(self.images)),
                reaper=self.reaper,
                write_output=self.write_output,
                write_errors=self.write_errors,
                known_pids=self.known_pids,
                is_stopping=self.is_stopping,
                log=self.log,
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
            image=image,
        )

    def read(self, current: Config) -> asyncio.Future[Reread]:
        """Read everything again, in a thread. The future raises ConfigError, and may be cancelled.

        A pipe may take seconds to come to its end, and the workers' signs of life would be missed meanwhile.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reread] = loop.create_future()

        def refuse(error: Exception) -> None:
            if not future.done():
                future.set_exception(error)

        def adopt(sources: Sources) -> None:
            if not future.done():
                try:
                    future.set_result(self._adopt(current, sources))
                except Exception as error:
                    refuse(error)

        def read() -> None:
            try:
                sources = self._sources(current)
            except Exception as error:
                tell(refuse, error)
            else:
                tell(adopt, sources)

        def tell(whom: Callable[[Any], None], what: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(whom, what)

        late = ConfigError(f"the configuration could not be read within {REREAD_WITHIN:g} s")
        timer = loop.call_later(REREAD_WITHIN, refuse, late)
        future.add_done_callback(lambda _: timer.cancel())
        try:
            # A daemon, because a read from a file system that hangs never returns.
            threading.Thread(target=read, name="reread", daemon=True).start()
        except RuntimeError as error:
            refuse(ConfigError(f"the configuration could not be read: {error}"))
        return future

    def _sources(self, current: Config) -> Sources:
        """Read what a reload needs. Blocks; raises ConfigError."""
        new = self.reread()
        if new.is_opaque != current.is_opaque:
            raise ConfigError(
                "a reload can't turn a target into a command or back; restart lastcall for that"
            )
        config = new.changed({name: getattr(current, name) for name in KEPT_BY_A_RELOAD})
        environment = environment_of(self.environment, config, again=True)
        key = ""
        if self.companion is not None:
            key = key_of(config.inworld, environment, again=True)
            check_way_out(environment)
        return Sources(wanted=new, config=config, environment=environment, key=key)

    def _adopt(self, current: Config, sources: Sources) -> Reread:
        waiting = [
            name for name in KEPT_BY_A_RELOAD if getattr(sources.wanted, name) != getattr(current, name)
        ]
        for name in waiting:
            still, new = getattr(current, name), getattr(sources.wanted, name)
            self.log.warning("takes effect at the next restart", key=name, still=still, new=new)
        for name in () if self.companion is None else self.companion.at_next_restart(sources.environment):
            # Without the values: a proxy may have a password.
            self.log.warning("takes effect at the next restart", key=name, of="inworld-pool")
            waiting.append(name)
        return Reread(
            config=sources.config,
            launcher=self.launcher(sources.config, sources.environment, sources.key),
            at_next_restart=tuple(waiting),
            settle=lambda is_taken_over: self._settle(sources.key, is_taken_over),
        )

    def _settle(self, key: str, is_taken_over: bool) -> None:
        if self.companion is not None:
            self.companion.settle(key, is_taken_over=is_taken_over)


def environment_of(environment: Mapping[str, str], config: Config, *, again: bool = False) -> dict[str, str]:
    """Return the environment with the variables of the env_file. Raises ConfigError for a bad env_file."""
    return {**environment, **configuration.environment_of(config.env_file, again=again)}
