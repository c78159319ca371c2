"""Sections of pages that scripts write: what stands between `<!-- name -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def with_section(page: str, name: str, text: str) -> str:
    """Return a page with one section replaced. Raises ValueError when the page has none of that name."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    after, count = pattern.subn(lambda found: f"{found[1]}{text}\n{found[2]}", page)
    if count != 1:
        raise ValueError(f"expected one section {name!r}, found {count}")
    return after


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Replace one section of a page. Raises ValueError when the page has none of that name."""
    page.write_text(with_section(page.read_text(), name, text))
