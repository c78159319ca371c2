"""A count with its noun, as people read it in logs, in the status and in messages."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return the number with the noun in the form that fits: `1 job`, `0 jobs`, `2 processes`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('s') else 's'}"
