"""The findings, for people and as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lastcall.supervisor.doctor.facts import Finding, Name

SCHEMA = 1
MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
# Cells in front of the reason of a finding.
INDENT = 22


def line(finding: Finding) -> str:
    """Return one finding; what to do stands below why."""
    head = f"{MARKS[finding.verdict]}  {finding.check:<14}  {finding.why}"
    return f"{head}\n{'':{INDENT}}do: {finding.do}" if finding.do else head


def table(names: Sequence[Name]) -> str:
    """Return the private names that lastcall uses: their number by package, and those that are missing."""
    lines = []
    for package, group in itertools.groupby(names, lambda each: f"{each.package} {each.version}"):
        found = list(group)
        missing = [each for each in found if each.lack]
        has = len(found) - len(missing)
        lines.append(f"private names of {package}: {has} of {len(found)} are there")
        lines += [f"lacks {each.name}  {each.lack}: {each.without or 'not supported'}" for each in missing]
    return "\n".join(["", *lines, "lastcall doctor --json lists them"])


def document(findings: Sequence[Finding], names: Sequence[Name]) -> dict[str, Any]:
    """Return the findings and the private names, ready for JSON."""
    ok = all(finding.verdict != "fail" for finding in findings)
    return {
        "schema": SCHEMA,
        "ok": ok,
        "findings": [asdict(finding) for finding in findings],
        "names": [asdict(name) for name in names],
    }
