"""The links between the pages of the tree: each names a file that is there, and a heading that the file has.

A page of docs/ may link to files of docs/ alone: the site has no others. Headings are named as the hosting
sites and mkdocs.yml name them: in lower case, without punctuation, with hyphens for spaces.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FOLDERS = (DOCS, ROOT / ".github", ROOT / "changes", ROOT / "examples")

FENCE = re.compile(r"^ *(```|~~~)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$")
LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^()\s]+)\)")
CODE = re.compile(r"`[^`]*`")
ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:")


def pages() -> list[Path]:
    """Return every page of Markdown in the tree."""
    return [*sorted(ROOT.glob("*.md")), *(p for folder in FOLDERS for p in sorted(folder.rglob("*.md")))]


def text_lines(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbered lines of a page that are no code."""
    is_code = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if FENCE.match(line):
            is_code = not is_code
        elif not is_code:
            yield number, line


def headings(page: Path) -> set[str]:
    """Return the names by which links find the headings of a page."""
    texts = [found[1] for _, line in text_lines(page) if (found := HEADING.match(line))]
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text) for text in texts]
    return {re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in plain}


def broken(page: Path) -> Iterator[str]:
    """Yield a line for each link of a page that leads nowhere."""
    for number, line in text_lines(page):
        for target in LINK.findall(CODE.sub("", line)):
            if ELSEWHERE.match(target):
                continue
            name, _, heading = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            where = f"{page.relative_to(ROOT)}:{number}: ({target})"
            if not file.exists():
                yield f"{where}: no such file"
            elif DOCS in page.parents and DOCS not in file.parents:
                yield f"{where}: leaves docs/, and the site has no such page; name the file as code"
            elif heading and file.suffix == ".md" and heading not in headings(file):
                yield f"{where}: the page has no such heading"


def main() -> None:
    found = [line for page in pages() for line in broken(page)]
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
