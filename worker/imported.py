"""The Python files that an agent has imported, for `lastcall dev`, which watches them."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import lastcall
from lastcall.worker.base.target_form import INSTALLED  # nobody edits these while developing

# Characters of one message. Ours: a character of a path is at most 6 bytes of JSON, and a message 256 KiB.
MAX_CHARACTERS = 40_000


def imported_files(modules: Iterable[object]) -> list[str]:
    """Return the files of modules outside the standard library, installed packages and lastcall."""
    folders = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), Path(lastcall.__file__).parent)
    outside = tuple(f"{folder}{os.sep}" for folder in folders)
    files = set()
    for module in modules:
        # Not by getattr: a module that is loaded at its first use would be loaded by the question.
        file = vars(module).get("__file__") if isinstance(module, ModuleType) else None
        if not isinstance(file, str) or not file.endswith(".py") or not os.path.isabs(file):
            continue
        path = os.path.normpath(file)
        if not path.startswith(outside) and INSTALLED.isdisjoint(Path(path).parts):
            files.add(path)
    return sorted(files)


def portions(files: Iterable[str]) -> Iterator[list[str]]:
    """Yield the files in lists that fit into one message each."""
    portion: list[str] = []
    size = 0
    for file in files:
        if portion and size + len(file) > MAX_CHARACTERS:
            yield portion
            portion, size = [], 0
        portion.append(file)
        size += len(file)
    if portion:
        yield portion
