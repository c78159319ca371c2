"""The findings, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lastcall.supervisor.doctor.facts import Finding, Name

SCHEMA = 1
MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def line(finding: Finding) -> str:
    """Return one finding; what to do stands below why."""
    head = f"{MARKS[finding.verdict]}  {finding.check:<14}  {finding.why}"
    return f"{head}\n{'':22}do: {finding.do}" if finding.do else head


def table(names: Sequence[Name]) -> str:
    """Return the private names that lastcall uses, by package, one a line."""
    lines, package = [], ""
    for each in names:
        if each.package != package:
            package = each.package
            lines.append(f"\nprivate names of {package} {each.version}")
        has = f"{each.lack}: {each.without or 'not supported'}" if each.lack else f"for {each.needed_by}"
        lines.append(f"{'lacks' if each.lack else 'has':<5} {each.name:<42} {has}")
    return "\n".join(lines)


def document(findings: Sequence[Finding], names: Sequence[Name]) -> dict[str, Any]:
    """Return the findings and the private names, ready for JSON."""
    ok = all(finding.verdict != "fail" for finding in findings)
    return {
        "schema": SCHEMA,
        "ok": ok,
        "findings": [asdict(finding) for finding in findings],
        "names": [asdict(name) for name in names],
    }
