"""The forms of TARGET: `path.py`, `path.py:attr` and `module:attr`.

Nothing here looks at the disk, so the supervisor can check a form that another machine will run.
"""

from __future__ import annotations

from dataclasses import dataclass

FORMS = "path.py, path.py:attr or module:attr"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetForm:
    """The parts of a TARGET. Either `file` or `module` is set, and `attribute` may be ""."""

    file: str = ""
    module: str = ""
    attribute: str = ""


def parse(text: str) -> TargetForm:
    """Return the parts of a TARGET. Raises ValueError, with one line, for a text of no known form.

    Only the last colon may begin an attribute: a directory may have colons in its name.
    """
    if "\n" in text or "\0" in text:
        raise ValueError(f"{text!r} is no target: expected {FORMS}")
    if is_file(text):
        return TargetForm(file=text)
    head, colon, attribute = text.rpartition(":")
    if is_file(head):
        if not attribute.isidentifier():
            raise ValueError(f"{text!r}: {attribute!r} is no attribute name, expected path.py:attr")
        return TargetForm(file=head, attribute=attribute)
    if not colon or not attribute.isidentifier() or not is_module(head):
        raise ValueError(f"{text!r} is no target: expected {FORMS}")
    return TargetForm(module=head, attribute=attribute)


def is_file(text: str) -> bool:
    """Tell whether the text has the form of a path to a Python file."""
    return text.endswith(".py") and text.rpartition("/")[2] != ".py"


def is_module(text: str) -> bool:
    """Tell whether the text has the form of a module's full name."""
    return all(part.isidentifier() for part in text.split("."))
