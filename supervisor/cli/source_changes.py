"""Changes of the files of an agent, which reload the agent in `lastcall dev`.

The files are looked at again and again. Notifications of the kernel (inotify) would tell sooner, and would
not do: there is a limit to them, and some file systems send none. The library for them stops at an unreadable
directory, and at a name that is no UTF-8. A look costs a few milliseconds, and looks take LOOK_SHARE of a
processor at most.
"""

from __future__ import annotations

import glob
import os
import subprocess
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Seconds between two looks, at least. Ours: a reload takes longer than that.
LOOK_INTERVAL = 0.5
# The part of one processor that looks may take. Ours: no more than a user would notice.
LOOK_SHARE = 0.05
# Seconds until changed files are looked at once more. Ours: an editor or a checkout writes its files in that.
SETTLE = 0.3
# Directories that are looked into, those near the target first. Ours: a look at so many takes about 0.2 s.
MAX_DIRECTORIES = 5000
# Seconds. Ours: git answers at once, unless its repository lies on a network that is gone.
GIT_TIMEOUT = 5.0
# Directories in which nobody edits an agent. Those whose names begin with a dot are left out too.
LEFT_OUT = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
# A file in the directory of a virtual environment, by PEP 405.
VENV_MARK = "pyvenv.cfg"
# Seconds after the start of a worker, or the end of a call, in which the agent may have written a file. Ours:
# an agent writes at its start and when a call ends, and a person first looks at what the last change did.
WRITTEN_WITHIN = 10.0
# New generations in a row in each of which a file changes, until the file is dropped.
MAX_REPEATS = 2

State = tuple[int, int, int]


def target_directory(target: str, working_directory: Path) -> Path:
    """Return the directory of a target that is a path, as Python sees it; else the working directory."""
    for text in (target, target.rpartition(":")[0]):
        if text and os.path.isfile(working_directory / text):
            return Path(os.path.realpath(working_directory / text)).parent
    return working_directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The state of each file that was found, and what could not be looked at.

    `walked` are the files that nothing but a walk has found. `is_cut_short`: there are too many directories.
    """

    states: dict[str, State]
    walked: frozenset[str]
    unreadable: tuple[str, ...]
    unmatched: tuple[str, ...]
    is_cut_short: bool


class Sources:
    """The files of an agent: Python files and `.env*` of its directory, those named, and those by pattern.

    `named` are files wherever they are. `patterns` are of `glob`, from the working directory.
    """

    def __init__(
        self, directory: Path, working_directory: Path, *, named: Iterable[str], patterns: Sequence[str]
    ) -> None:
        self.directory = directory
        self._working_directory = working_directory
        self._named = {self._absolute(name) for name in named}
        self._patterns = patterns
        self._dropped: set[str] = set()
        self._before: Look | None = None

    def name(self, files: Iterable[str]) -> None:
        """Add files, each in the state in which the next look finds it."""
        new = {self._absolute(file) for file in files} - self._named
        self._named |= new
        if self._before is not None:
            before = self._before.states
            found = ((path, _state(path)) for path in new - before.keys())
            before |= {path: state for path, state in found if state is not None}

    def drop(self, files: Iterable[str]) -> None:
        """Look at these files no more."""
        self._dropped.update(files)

    def look(self) -> Look:
        """Look at every file. Raises nothing that a file or a directory can cause."""
        walked, unreadable, is_cut_short = _walk(self.directory)
        try:
            here = {path for path in _entries(self._working_directory)[0] if is_env_file(path)}
        except OSError:
            here = set()
        by_pattern = {pattern: set(self._matching(pattern)) for pattern in self._patterns}
        matching = set().union(*by_pattern.values())
        files = (walked | here | matching | self._named) - self._dropped
        states = {path: state for path in files if (state := _state(path)) is not None}
        chosen = matching | self._named
        return Look(
            states=states,
            walked=frozenset((walked | here) - chosen),
            unreadable=tuple(unreadable),
            unmatched=tuple(pattern for pattern, found in by_pattern.items() if not found),
            is_cut_short=is_cut_short,
        )

    def changed(self, look: Look) -> set[str]:
        """Return the files that have changed since the last look that was kept; none at the first look.

        Files that git ignores are left out, unless the agent has imported them, or a pattern asks for them.
        """
        if self._before is None:
            return set()
        before, states = self._before.states, look.states
        names = {path for path in before.keys() | states.keys() if before.get(path) != states.get(path)}
        names -= self._dropped
        return names - ignored_by_git(self.directory, names & (look.walked | self._before.walked))

    def keep(self, look: Look) -> None:
        """Take a look as the one that later looks are compared with."""
        self._before = look

    def _matching(self, pattern: str) -> Iterator[str]:
        root = str(self._working_directory)
        for found in glob.iglob(pattern, root_dir=root, recursive=True, include_hidden=True):
            path = self._absolute(found)
            if not os.path.isdir(path):
                yield path

    def _absolute(self, name: str) -> str:
        return os.path.abspath(os.path.join(self._working_directory, name))


class Repeats:
    """Files that change in each new generation: the agent writes them, and no person does."""

    def __init__(self) -> None:
        # By file and generation: whether a change came when the agent may have written the file.
        self._early: dict[str, dict[int, bool]] = {}

    def repeated(self, names: Collection[str], *, generation: int, is_early: bool) -> set[str]:
        """Return the files to drop, of those that have changed while `generation` was the newest.

        `is_early`: the change follows the start of that generation, or the end of a call, closely.
        """
        last = range(generation - MAX_REPEATS, generation + 1)
        for name in names:
            known = self._early.get(name, {})
            self._early[name] = {number: known[number] for number in last if number in known}
            self._early[name][generation] = known.get(generation, False) or is_early
        return {name for name in names if all(self._early[name].get(number) for number in last)}

    def call_has_ended(self, generation: int) -> None:
        """Take the changes of a generation for the agent's: a call may have written files at its end."""
        for early in self._early.values():
            if generation in early:
                early[generation] = True


def is_env_file(path: str) -> bool:
    """Tell whether a file is one of variables by its name: `.env`, `.env.local`."""
    return os.path.basename(path).startswith(".env")


def shown(path: str, directory: Path) -> str:
    """Return a file's name for people, from the directory; what is no text in the name is escaped."""
    name = os.path.relpath(path, directory) if Path(path).is_relative_to(directory) else path
    text = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def ignored_by_git(directory: Path, paths: Collection[str]) -> set[str]:
    """Return those of the paths that git ignores; none where there is no git or no repository."""
    if not paths:
        return set()
    try:
        done = subprocess.run(
            ["git", "-C", os.fsencode(directory), "check-ignore", "-z", "--stdin"],
            # Names are bytes to git, and need not be text.
            input=b"\0".join(os.fsencode(path) for path in paths),
            capture_output=True,
            timeout=GIT_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return {os.fsdecode(name) for name in done.stdout.split(b"\0") if name}


def _walk(directory: Path) -> tuple[set[str], list[str], bool]:
    """Return Python and env files below a directory, unreadable directories, and whether it was too large."""
    found: set[str] = set()
    unreadable: list[str] = []
    waiting = deque([os.fspath(directory)])
    count = 0
    while waiting:
        if count == MAX_DIRECTORIES:
            return found, unreadable, True
        count += 1
        here = waiting.popleft()
        try:
            files, below = _entries(here)
        except OSError:
            unreadable.append(here)
            continue
        if here != os.fspath(directory) and os.path.join(here, VENV_MARK) in files:
            continue
        found.update(path for path in files if path.endswith(".py") or is_env_file(path))
        waiting.extend(below)
    return found, unreadable, False


def _entries(directory: str | Path) -> tuple[list[str], list[str]]:
    """Return the files in a directory, and the directories that are to be looked into. Raises OSError."""
    files: list[str] = []
    below: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            # Links are not followed: one may lead to where nobody may look, or back.
            if not entry.is_dir(follow_symlinks=False):
                files.append(entry.path)
            elif not entry.name.startswith(".") and entry.name not in LEFT_OUT:
                below.append(entry.path)
    return files, below


def _state(path: str) -> State | None:
    """Return what differs after a file was written or replaced; None for a file that can't be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
