"""Sections of pages that scripts write: what stands between `<!-- name -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def write_section(name: str, text: str, page: Path = PAGE) -> None:
    """Replace one section. Raises ValueError when the page has none of that name."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    before = page.read_text()
    after, count = pattern.subn(lambda found: f"{found[1]}{text}\n{found[2]}", before)
    if count != 1:
        raise ValueError(f"{page}: expected one section {name!r}, found {count}")
    page.write_text(after)
