"""The rules of prose: which sentences are found, and that a count may only fall."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "prose"
# Every rule is broken once, so each sample below is checked against the others as well.
FINDINGS = {
    "inverted opening": "What is dropped is counted.",
    "first person": "The lock is a lock of ours.",
    "its own": "Each slot has its own clock.",
    "who for a thing": "The slot wakes the task who waits.",
    "metaphor": "The slot is told at birth.",
    "second word": "The companion has the pool.",
    "long sentence": "The slot stops " + "and stops " * 18 + "in the end.",
    "chain of clauses": "The slot stops; the worker ends; the supervisor exits.",
}
CLEAN = [
    "The slot counts the lines that it drops.",
    "What is left?",
    "A user who presses Ctrl-C ends the drain.",
    "`what our companion said; in its own words; goodbye` is code.",
    "Ours: the figure was measured.",
    "The slot stops the worker; the worker exits.",
]


def prose(root: Path, *arguments: str) -> tuple[int, str]:
    """Run the script of a tree; return the exit code and all that it printed."""
    # Without site-packages, which the script does not use, Python starts in half the time.
    command = [sys.executable, "-S", str(root / "scripts" / "prose"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return an empty tree that has the script and no figures."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "docs").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts" / "prose")
    return tmp_path


def page(tree: Path, *sentences: str) -> Path:
    path = tree / "docs" / "page.md"
    path.write_text("# What a heading says\n\n" + "\n".join(sentences) + "\n")
    return path


@pytest.mark.parametrize("rule", FINDINGS)
def test_each_rule_finds_its_sentence(tree: Path, rule: str) -> None:
    """A sentence that breaks one rule is found by that rule alone, on the line where it begins."""
    path = page(tree, CLEAN[0], FINDINGS[rule], CLEAN[0])
    code, output = prose(tree, str(path))
    assert code == 0 and len(output.splitlines()) == 1, output
    assert output.startswith(f"docs/page.md:4: {rule}: ")


@pytest.mark.parametrize("sentence", CLEAN)
def test_clean_sentences_are_not_found(tree: Path, sentence: str) -> None:
    """A question, a person, code in backquotes and the source of a figure are no findings."""
    assert prose(tree, str(page(tree, sentence))) == (0, "")


def test_python(tree: Path) -> None:
    """Docstrings, texts below members and comments are read; other strings and drawings are not."""
    path = tree / "scripts" / "sample"
    path.write_text('''#!/usr/bin/env python3
"""What stands here is found.

    what stands   in a drawing of ours
"""

class Lamp:
    ON = "What a string says is of ours."
    """Whoever reads this finds a text below a member."""

    def burn(self) -> None:
        """Burn.

        None of this is
        said by us.
        """
        # A comment of
        # two lines is ours.
        self.ON = "x"  # type: ignore[misc]  # a reason of ours
''')
    _, output = prose(tree, str(path))
    where = [
        line.split(": ")[0].rpartition(":")[2] + " " + line.split(": ")[1] for line in output.splitlines()
    ]
    assert where == [
        "2 inverted opening",
        "9 inverted opening",
        "9 who for a thing",
        "14 inverted opening",
        "14 first person",
        "17 first person",
        "19 first person",
    ]


def test_markdown(tree: Path) -> None:
    """Cells and items are read one by one; quotations, code and rendered tables are not."""
    path = tree / "docs" / "page.md"
    path.write_text("""\
> What is quoted was said by us.

```text
What is code is ours.
```

<!-- slot table -->
| What is rendered | ours |
<!-- end -->

| what | meaning |
| --- | --- |
| lamp | a lamp of ours |

- an item of
  ours
1. The second item is clean.
""")
    _, output = prose(tree, str(path))
    assert [line.split(": ")[0] for line in output.splitlines()] == ["docs/page.md:13", "docs/page.md:15"]


def test_a_count_may_only_fall(tree: Path) -> None:
    """A risen count fails. --write lowers figures and raises none; --measure raises them too."""
    bad = FINDINGS["first person"]
    page(tree, bad, bad)
    assert prose(tree, "--measure") == (0, "")
    assert prose(tree) == (0, "")

    page(tree, bad, bad, bad)
    code, output = prose(tree)
    assert code == 1 and "first person: 3 findings, 2 allowed" in output
    assert prose(tree, "--write")[0] == 1

    page(tree, bad)
    code, output = prose(tree)
    assert code == 0 and "run scripts/prose --write" in output
    assert prose(tree, "--write") == (0, "")
    page(tree, bad, bad)
    assert prose(tree)[0] == 1
    assert prose(tree, "--measure")[0] == 0
    assert prose(tree)[0] == 0


def test_only_newer_findings_are_shown(tree: Path) -> None:
    """When a count has risen, the lines written after the figures are shown, and the older are not."""
    git = ["git", "-C", str(tree), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    bad, clean = FINDINGS["first person"], CLEAN[0]
    page(tree, bad, clean)
    prose(tree, "--measure")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "figures"]):
        subprocess.run([*git, *command], check=True, capture_output=True)

    page(tree, bad, clean, bad)
    (tree / "docs" / "new.md").write_text(bad + "\n")
    code, output = prose(tree)
    shown = [line.split(": ")[0].strip() for line in output.splitlines() if line.startswith("  ")]
    assert code == 1 and shown == ["docs/new.md:1", "docs/page.md:5"]


def test_a_wrong_option_is_refused(tree: Path) -> None:
    """An option that the script does not know ends with the usage and writes nothing."""
    code, output = prose(tree, "--wrote")
    assert code == 1 and "usage:" in output and "--measure" in output
    assert not (tree / "scripts" / "prose.toml").exists()
