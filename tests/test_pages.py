"""The pages: each is in the site, its links lead somewhere, and its rendered parts are current."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lastcall
from scripts import links

ROOT = Path(__file__).parent.parent
# Lines of mkdocs.yml, which only the builder can load: a tag of Python is in it.
NAV = re.compile(r"^ +- (?:\"[^\"]+\"|[^:\n]+): (\S+\.md)$", re.MULTILINE)
FRAGMENT = re.compile(r"\+[a-z0-9-]+\.(added|changed|fixed|removed|security)\.md")


def test_every_page_is_in_the_nav() -> None:
    """A page that no reader of the site can find is named here."""
    listed = NAV.findall((ROOT / "mkdocs.yml").read_text())
    there = {str(path.relative_to(links.DOCS)) for path in links.DOCS.rglob("*.md")}
    missing = sorted(there - set(listed))
    assert not missing, f"give each of these a line in `nav` of mkdocs.yml: {', '.join(missing)}"
    assert sorted(listed) == sorted(there), "a line of `nav` has no page, or a page has two"


def test_every_link_leads_somewhere() -> None:
    """No link of a page names a file or a heading that is not there."""
    broken = [line for page in links.pages() for line in links.broken(page)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("why.md", ""),
        ("#a-heading", ""),
        ("why.md#ways-that-are-left", ""),
        ("nowhere.md", "no such file"),
        ("why.md#nowhere", "no such heading"),
        ("../README.md", "leaves docs/"),
    ],
)
def test_what_is_a_broken_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, says: str
) -> None:
    """Files, headings, and what the site does not have; links in code are none."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (tmp_path / "README.md").touch()
    (docs / "why.md").write_text("## Ways that are left\n")
    page = docs / "page.md"
    page.write_text(f"# A `heading`\n\nA [link]({target}), `[no](link.md)`.\n\n```\n[no](link.md)\n```\n")
    monkeypatch.setattr(links, "ROOT", tmp_path)
    monkeypatch.setattr(links, "DOCS", docs)
    found = list(links.broken(page))
    assert [says in line for line in found] == ([True] if says else [])


def test_the_rendered_parts_are_current() -> None:
    """API, commands, metrics, signals, exit codes, variables and files of examples are those of the tree."""
    script = ROOT / "scripts" / "reference"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_the_public_names_say_since_when() -> None:
    """A reader of the API can tell which version of lastcall an agent needs."""
    public = (getattr(lastcall, name) for name in lastcall.__all__ if name not in ("__version__", "inworld"))
    documented = [*public, lastcall.inworld.TTS]
    assert len(documented) > 8
    silent = [thing.__name__ for thing in documented if not re.search(r"Since\s+\d", thing.__doc__ or "")]
    assert silent == []


def evidence() -> Iterator[tuple[str, str, str]]:
    """Yield the tests that pages name, as page, file and function."""
    for page in (ROOT / "README.md", *sorted(links.DOCS.glob("*.md"))):
        file = ""
        for path, name in re.findall(r"`(tests/\w+\.py)?(?:::(test_\w+))?`", page.read_text()):
            file = path or file
            if file:
                yield page.name, file, name


def test_the_pages_name_tests_that_are_there() -> None:
    """A page that names a test as its evidence names one of this tree."""
    named = list(evidence())
    assert len(named) > 20
    for page, file, name in named:
        assert (ROOT / file).is_file(), f"{page} names {file}"
        assert not name or f"def {name}(" in (ROOT / file).read_text(), f"{page} names {file}::{name}"


def test_fragments_of_the_changelog() -> None:
    """towncrier takes every file in changes/, and leaves none out."""
    names = [path.name for path in (ROOT / "changes").iterdir() if path.name != "README.md"]
    wrong = [name for name in names if not FRAGMENT.fullmatch(name)]
    assert not wrong, f"expected +WORDS.KIND.md, as in {FRAGMENT.pattern}: {', '.join(wrong)}"
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "9.9.9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "## 9.9.9" in done.stdout
