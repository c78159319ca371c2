"""The forms of TARGET: `path.py`, `path.py:attr`, `module:attr` and `-m module`.

Nothing here looks at the disk, so the supervisor can check a form that another machine will run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from lastcall.worker.base.records import dataclass

FORMS = "path.py, path.py:attr, module:attr or -m module"
# In front of the name of a module that is run as a program, and of the arguments of the program itself.
MODULE = "-m"
ARGUMENTS = "--args"
# Folders of installed packages (sys.path of CPython, and of Debian's).
INSTALLED = frozenset({"site-packages", "dist-packages"})
# Bytes of a target: as a path may have (PATH_MAX of Linux, limits.h). The name of a module is part of one.
MAX_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetForm:
    """The parts of a TARGET. Either `file` or `module` is set, and `attribute` may be "".

    A module without an attribute is run as a program, as `python -m` does.
    """

    file: str = ""
    module: str = ""
    attribute: str = ""


def parse(text: str) -> TargetForm:
    """Return the parts of a TARGET. Raises ValueError, with one line, for a text of no known form.

    Only the last colon may begin an attribute: a directory may have colons in its name.
    """
    if is_too_long(text):
        raise ValueError(f"{text[:40]!r}… is no target: expected at most {MAX_BYTES} bytes of {FORMS}")
    if "\n" in text or "\0" in text:
        raise ValueError(f"{text!r} is no target: expected {FORMS}")
    if is_file(text):
        return TargetForm(file=text)
    if text.startswith(f"{MODULE} "):
        module = text.removeprefix(f"{MODULE} ")
        if not is_module(module):
            raise ValueError(
                f"{MODULE} {module!r}: expected the full name of a module, as in -m package.module"
            )
        return TargetForm(module=module)
    head, colon, attribute = text.rpartition(":")
    if is_file(head):
        if not attribute.isidentifier():
            raise ValueError(f"{text!r}: {attribute!r} is no attribute name, expected path.py:attr")
        return TargetForm(file=head, attribute=attribute)
    if not colon or not attribute.isidentifier() or not is_module(head):
        raise ValueError(f"{text!r} is no target: expected {FORMS}")
    return TargetForm(module=head, attribute=attribute)


def is_too_long(text: str) -> bool:
    """Tell whether a target is too long to name a file or a module."""
    return len(os.fsencode(text)) > MAX_BYTES


def words(target: str, arguments: Sequence[str] = ()) -> list[str]:
    """Return a target and the arguments of the program as words of a command line."""
    first = target.split(" ", 1) if target.startswith(f"{MODULE} ") else [target]
    return [*first, *tail(arguments)]


def tail(arguments: Sequence[str]) -> list[str]:
    """Return the words that end a command line, for the arguments of the program."""
    return [ARGUMENTS, *arguments] if arguments else []


def read_words(given: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the target and the arguments that `words` made words of; None for words of another form."""
    count = 2 if given[:1] == [MODULE] else 1
    target, rest = " ".join(given[:count]), list(given[count:])
    if len(given) < count or (count == 1 and target.startswith("-")) or rest[:1] not in ([], [ARGUMENTS]):
        return None
    return target, rest[1:]


def is_file(text: str) -> bool:
    """Tell whether the text has the form of a path to a Python file."""
    return text.endswith(".py") and text.rpartition("/")[2] != ".py"


def is_module(text: str) -> bool:
    """Tell whether the text has the form of a module's full name."""
    return all(part.isidentifier() for part in text.split("."))
