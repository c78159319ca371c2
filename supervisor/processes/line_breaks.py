"""Lines for a terminal, broken between words: a terminal by itself breaks them anywhere.

A line with any control character but those of colours is left as it is, because a program draws with them.
"""

from __future__ import annotations

import re
import unicodedata

# Cells in front of each part of a line but the first. Ours: the parts are seen to belong together.
INDENT = 4
# Cells of the narrowest terminal for which lines are broken. Ours: a terminal that was given no size has 0.
NARROWEST = 10
# "Select Graphic Rendition", the sequences of colours: ECMA-48, 8.3.117.
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
WORD = re.compile(r"( *)([^ ]+)")


def broken(line: str, width: int, indent: int = INDENT) -> str:
    """Return a line, without the newline at its end, with newlines between words where it is too wide.

    `width` and `indent` are in cells. A word that is wider than the terminal stays whole, and the terminal
    breaks it.
    """
    indent = min(indent, width // 3)
    text = COLOUR.sub("", line)
    if width < NARROWEST or len(text) * 2 <= width or CONTROL.search(text) or cells(text) <= width:
        return line
    parts: list[str] = []
    column = 0
    for gap, word in WORD.findall(line):
        size = cells(COLOUR.sub("", word))
        is_first = not parts
        if not is_first and column + len(gap) + size > width:
            parts.append(f"\n{' ' * indent}{word}")
            column = indent + size
        else:
            parts.append(gap + word)
            column += len(gap) + size
        if column > width:
            column %= width  # where the terminal is after a word that it had to break
    return "".join(parts)


def cells(text: str) -> int:
    """Return how many cells of a terminal a text takes: two for a wide character, none for a mark on one."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1
        for each in text
    )
