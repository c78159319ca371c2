"""The findings, for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lastcall.supervisor.doctor.facts import Finding

SCHEMA = 1
MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def line(finding: Finding) -> str:
    """Return one finding; what to do stands below why."""
    head = f"{MARKS[finding.verdict]}  {finding.check:<14}  {finding.why}"
    return f"{head}\n{'':22}do: {finding.do}" if finding.do else head


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings, ready for JSON."""
    ok = all(finding.verdict != "fail" for finding in findings)
    return {"schema": SCHEMA, "ok": ok, "findings": [asdict(finding) for finding in findings]}
