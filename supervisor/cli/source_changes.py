"""Changes of an agent's source files, which trigger a reload while somebody develops."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

from watchfiles import Change, DefaultFilter, awatch

# Milliseconds. Ours: an editor or a checkout writes its files within that time.
DEBOUNCE_MS = 300
# Seconds. Ours: git answers at once, unless its repository lies on a network that is gone.
GIT_TIMEOUT = 5.0
# Ends of the names of files that people write for an agent.
SOURCE_SUFFIXES = frozenset(
    (
        *(".py", ".pyi", ".toml", ".yaml", ".yml", ".json", ".ini", ".cfg"),
        *(".txt", ".md", ".j2", ".jinja", ".html"),
    )
)


async def changes(directory: Path) -> AsyncIterator[set[str]]:
    """Yield the names of changed source files, without ignored ones; files that change together at once."""
    # The default filter leaves out caches, editors' files and .git; git knows the other files to ignore.
    async for changed in awatch(directory, watch_filter=_Filter(), debounce=DEBOUNCE_MS):
        paths = {str(Path(path).relative_to(directory)) for _, path in changed}
        names = paths - await asyncio.to_thread(ignored_by_git, directory, paths)
        if names:
            yield names


class _Filter(DefaultFilter):
    def __call__(self, change: Change, path: str) -> bool:
        return super().__call__(change, path) and is_source(Path(path))


def is_source(path: Path) -> bool:
    """Tell whether people write such a file: logs and recordings of an agent must not reload the agent."""
    return path.suffix in SOURCE_SUFFIXES or path.name.startswith(".env")


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
