"""`lastcall dev`: one worker, replaced whenever the code changes; a running call finishes on the old code."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from watchfiles import Change, DefaultFilter, awatch

from lastcall.supervisor import config as configuration
from lastcall.supervisor.app import App
from lastcall.supervisor.cli.local_server import local_server
from lastcall.supervisor.config import Config
from lastcall.supervisor.environment import surroundings
from lastcall.supervisor.errors import Refused
from lastcall.supervisor.signals import Inbox
from lastcall.worker.base.exit_codes import Exit
from lastcall.worker.base.settings import WorkerSettings

GRACE = 10.0
DEBOUNCE_MS = 300
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
GIT_TIMEOUT = 5.0
SOURCES = frozenset(
    {
        ".py",
        ".pyi",
        ".toml",
        ".yaml",
        ".yml",
        ".json",
        ".txt",
        ".md",
        ".j2",
        ".jinja",
        ".html",
        ".ini",
        ".cfg",
    }
)


async def dev(inbox: Inbox, load: Callable[[], Config], *, directory: Path) -> Exit:
    """Run until a signal; every change below the directory is a reload."""
    config = load()
    async with AsyncExitStack() as stack:
        environment = dict(os.environ)
        known = {**environment, **configuration.environment_of(config.env_file)}
        settings = WorkerSettings()
        spared: frozenset[int] = frozenset()
        is_local = not known.get("LIVEKIT_URL")
        if is_local:
            server = await stack.enter_async_context(local_server("lastcall.worker.local", ["--greet"]))
            environment |= server.environment
            settings, spared = WorkerSettings(mock_room=True), frozenset({server.pid})
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
        else:
            for line in remarks(known):
                app.log.warning(line)
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(_reload_on_change(app, directory))
            code = await app.run()
            watching.cancel()
    return code


def remarks(environment: Mapping[str, str]) -> list[str]:
    """Say so when this worker would take the calls of others."""
    host = urlsplit(environment["LIVEKIT_URL"]).hostname or ""
    if host in LOCAL_HOSTS:
        return []
    return [
        f"LIVEKIT_URL points at {host}: this worker takes real calls there beside the others;"
        " unset it for a local dispatch server"
    ]


async def _reload_on_change(app: App, directory: Path) -> None:
    async for names in changes(directory):
        app.log.info("changed", files=", ".join(sorted(names)[:5]))
        try:
            app.operations.reload()
        except Refused as error:
            app.log.warning("no reload", reason=str(error))


async def changes(directory: Path) -> AsyncIterator[set[str]]:
    """Yield the names of changed files, several at once when they change together, without ignored ones."""
    # Its own default filter leaves out caches, editors' files and .git; git knows the rest.
    async for changed in awatch(directory, watch_filter=_Filter(), debounce=DEBOUNCE_MS, step=50):
        paths = {str(Path(path).relative_to(directory)) for _, path in changed}
        names = paths - await asyncio.to_thread(ignored_by_git, directory, paths)
        if names:
            yield names


class _Filter(DefaultFilter):
    def __call__(self, change: Change, path: str) -> bool:
        return super().__call__(change, path) and is_source(Path(path))


def is_source(path: Path) -> bool:
    """Tell whether a file is one that people write: an agent's own logs and recordings must not reload it."""
    return path.suffix in SOURCES or path.name.startswith(".env")


def ignored_by_git(directory: Path, paths: set[str]) -> set[str]:
    """Return those of the paths that git ignores; none where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), "check-ignore", "-z", "--stdin"],
            input="\0".join(paths).encode(),
            capture_output=True,
            timeout=GIT_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return {name.decode(errors="surrogateescape") for name in done.stdout.split(b"\0") if name}


def defaults() -> dict[str, Any]:
    """What `dev` sets where neither flag, environment nor file does."""
    return {"grace": GRACE, "http": "127.0.0.1:0", "log_format": "console", "workers": 1}
