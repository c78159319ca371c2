"""`lastcall dev`: one worker, which is replaced whenever the code changes."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from lastcall.supervisor.app import App
from lastcall.supervisor.cli.beside import run_with
from lastcall.supervisor.cli.local_server import local_server
from lastcall.supervisor.cli.source_changes import (
    LOOK_INTERVAL,
    LOOK_SHARE,
    MAX_DIRECTORIES,
    SETTLE,
    WRITTEN_WITHIN,
    Look,
    Repeats,
    Sources,
    shown,
    target_directory,
)
from lastcall.supervisor.config.env_file import environment_of
from lastcall.supervisor.config.options import Config
from lastcall.supervisor.config.values import shown as shown_value
from lastcall.supervisor.environment import surroundings
from lastcall.supervisor.errors import ConfigError, Refused
from lastcall.supervisor.signals import Inbox
from lastcall.worker.base.clock import now
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.settings import WorkerSettings

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
# Directories that are told to be unreadable. Ours: more would hide what else the log says.
MAX_TOLD = 20


async def dev(
    inbox: Inbox,
    load: Callable[[], Config],
    *,
    directory: Path,
    config_files: Sequence[str],
    patterns: Sequence[str],
) -> Exit:
    """Run until a signal; every change of a source is a reload.

    `directory` is the working directory, `config_files` are the places of a configuration, and `patterns` ask
    for more files, as `--watch` does.
    """
    config = load()
    target = target_directory(config.target, directory)
    sources = Sources(target, directory, named=config_files, patterns=patterns)
    async with AsyncExitStack() as stack:
        environment = dict(os.environ)
        known = {**environment, **environment_of(config.env_file)}
        settings = WorkerSettings(tells_imports=True)
        spared: frozenset[int] = frozenset()
        is_local = not known.get("LIVEKIT_URL")
        check_livekit_url(known.get("LIVEKIT_URL", ""))
        if is_local:
            server = await stack.enter_async_context(local_server("lastcall.worker.local", ["--greet"]))
            environment |= server.environment
            settings = replace(settings, local_url=server.environment["LIVEKIT_URL"])
            spared = frozenset({server.pid})
        around = surroundings(
            environment=environment,
            worker_settings=settings,
            spared_pids=spared,
            prefixes_lines=True,
            has_patience=False,
        )
        app = App(config, inbox, around, reread=load)
        if is_local:
            app.log.info("LIVEKIT_URL is not set: local dispatch server, a call for each new worker")
        elif host := remote_host(known["LIVEKIT_URL"]):
            app.log.warning(
                "LIVEKIT_URL is a remote server: this worker takes real calls there beside the others;"
                " unset it for a local dispatch server",
                host=host,
            )
        watching = _Watching(app, sources, load_names=lambda: [*config_files, app.config.env_file])
        return await run_with(app, {"the watch for changes": watching.run})


def check_livekit_url(url: str) -> None:
    """Refuse text that is no URL, which the worker would try again and again. Raises ConfigError."""
    try:
        _ = urlsplit(url).port
    except ValueError as error:
        raise ConfigError(f"LIVEKIT_URL: got {shown_value(url)}, expected wss://HOST") from error


def remote_host(url: str) -> str:
    """Return the host of a LiveKit server that other workers may use too; empty for one on this machine."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return ""  # no URL at all: the worker says so
    return "" if host in LOCAL_HOSTS else host


class _Watching:
    """Looks at the sources again and again, and has the workers replaced when one has changed.

    `load_names` returns the files that the configuration is from.
    """

    def __init__(self, app: App, sources: Sources, *, load_names: Callable[[], Iterable[str]]) -> None:
        self._app = app
        self._sources = sources
        self._load_names = load_names
        self._repeats = Repeats()
        self._jobs_ended = 0
        # When the last call has ended, and when the last change was seen, in which generation.
        self._ended_at = self._changed_at = -math.inf
        self._changed_in = 0
        self._told: set[str] = set()
        self._cost = 0.0

    async def run(self) -> None:
        """Run until cancelled. A fault of the watch itself is told once, and the watch goes on."""
        while True:
            try:
                await self._look()
            except Exception as error:
                self._tell_once(repr(error), "could not look for changes", reason=repr(error))
            await asyncio.sleep(max(LOOK_INTERVAL, self._cost / LOOK_SHARE))

    async def _look(self) -> None:
        self._note_ends()
        names = {name for name in self._load_names() if name}
        for generation in self._app.fleet.generations:
            names |= generation.reports.imported
        look, changed = await asyncio.to_thread(self._look_now, names)
        if changed:
            await asyncio.sleep(SETTLE)
            look, changed = await asyncio.to_thread(self._look_now, names)
        self._sources.keep(look)
        for path in look.unreadable:
            self._tell_once(path, "directory can't be watched", directory=self._shown(path))
        for pattern in look.unmatched:
            self._tell_once(f"--watch {pattern}", "no file matches", watch=self._shown(pattern))
        if look.is_cut_short:
            self._tell_once("", "too many directories to watch all", watched=MAX_DIRECTORIES)
        if changed:
            self._act(changed)

    def _look_now(self, names: set[str]) -> tuple[Look, set[str]]:
        began = time.thread_time()
        self._sources.name(names)
        look = self._sources.look()
        changed = self._sources.changed(look)
        self._cost = time.thread_time() - began
        return look, changed

    def _act(self, changed: set[str]) -> None:
        newest = max(self._app.fleet.generations, key=lambda each: each.number, default=None)
        if newest is None:
            return
        since = math.inf if newest.ready_at is None else max(newest.ready_at, self._ended_at)
        self._changed_at, self._changed_in = now(), newest.number
        repeated = self._repeats.repeated(
            changed, generation=newest.number, is_early=self._changed_at - since < WRITTEN_WITHIN
        )
        if repeated:
            self._sources.drop(repeated)
            self._app.log.warning(
                "no longer watched: changes with each new worker; lastcall reload takes it in",
                files=self._list(repeated),
            )
        if not changed - repeated:
            return
        self._app.log.info("changed", files=self._list(changed - repeated))
        try:
            self._app.operations.reload()
        except Refused as error:
            self._app.log.warning("no reload", reason=str(error))

    def _note_ends(self) -> None:
        ended = sum(self._app.ledger.totals.values())
        if ended != self._jobs_ended:
            self._jobs_ended, self._ended_at = ended, now()
            if self._ended_at - self._changed_at < WRITTEN_WITHIN:
                self._repeats.call_has_ended(self._changed_in)

    def _tell_once(self, key: str, event: str, **values: object) -> None:
        if key not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(key)
            self._app.log.warning(event, **values)

    def _list(self, paths: set[str]) -> str:
        return ", ".join(self._shown(path) for path in sorted(paths)[:5])

    def _shown(self, path: str) -> str:
        return shown(path, self._sources.directory)
