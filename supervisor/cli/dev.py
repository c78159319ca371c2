"""`lastcall dev`: one worker, which is replaced whenever the code changes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

from lastcall.supervisor.app import App
from lastcall.supervisor.cli.local_server import local_server
from lastcall.supervisor.cli.source_changes import changes
from lastcall.supervisor.config.env_file import environment_of
from lastcall.supervisor.config.options import Config
from lastcall.supervisor.environment import surroundings
from lastcall.supervisor.errors import ConfigError, Refused
from lastcall.supervisor.signals import Inbox
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.settings import WorkerSettings

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


async def dev(inbox: Inbox, load: Callable[[], Config], *, directory: Path) -> Exit:
    """Run until a signal; every change below the directory is a reload."""
    config = load()
    async with AsyncExitStack() as stack:
        environment = dict(os.environ)
        known = {**environment, **environment_of(config.env_file)}
        settings = WorkerSettings()
        spared: frozenset[int] = frozenset()
        is_local = not known.get("LIVEKIT_URL")
        if is_local:
            server = await stack.enter_async_context(local_server("lastcall.worker.local", ["--greet"]))
            environment |= server.environment
            settings = WorkerSettings(local_url=server.environment["LIVEKIT_URL"])
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
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(_reload_on_change(app, directory))
            try:
                code, wrong = await app.run(), None
            except ConfigError as error:  # not from here: the group would wrap it
                code, wrong = Exit.CONFIG, error
            watching.cancel()
    if wrong is not None:
        raise wrong
    return code


def remote_host(url: str) -> str:
    """Return the host of a LiveKit server that other workers may use too; empty for one on this machine."""
    host = urlsplit(url).hostname or ""
    return "" if host in LOCAL_HOSTS else host


async def _reload_on_change(app: App, directory: Path) -> None:
    async for names in changes(directory):
        app.log.info("changed", files=", ".join(sorted(names)[:5]))
        try:
            app.operations.reload()
        except Refused as error:
            app.log.warning("no reload", reason=str(error))
