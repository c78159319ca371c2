"""A rehearsal's result: for people, as JSON, and as JUnit XML for a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from lastcall.supervisor.rehearsal.scenes import SceneResult

SCHEMA = 1


def line(verdict: SceneResult) -> str:
    """Return what is printed of one scene, with its problems below it."""
    head = f"{'ok  ' if verdict.is_good else 'FAIL'}  {verdict.scene.name:<10} {verdict.seconds:5.1f} s"
    below = [f"        {problem}" for problem in verdict.problems]
    below += [f"        note: {warning}" for warning in verdict.warnings]
    return "\n".join([f"{head}  {verdict.scene.says}", *below])


def document(target: str, verdicts: Sequence[SceneResult]) -> dict[str, Any]:
    """Return the result, ready for JSON."""
    return {
        "schema": SCHEMA,
        "target": target,
        "ok": all(verdict.is_good for verdict in verdicts),
        "seconds": round(sum(verdict.seconds for verdict in verdicts), 3),
        "scenes": [
            {
                "name": verdict.scene.name,
                "as": verdict.scene.says,
                "ok": verdict.is_good,
                "seconds": round(verdict.seconds, 3),
                "exit_code": verdict.exit_code,
                "problems": list(verdict.problems),
                "warnings": list(verdict.warnings),
            }
            for verdict in verdicts
        ],
    }


def junit(target: str, verdicts: Sequence[SceneResult]) -> str:
    """Return the result as JUnit XML, one test case a scene."""
    seconds = f"{sum(verdict.seconds for verdict in verdicts):.3f}"
    failures = str(sum(not verdict.is_good for verdict in verdicts))
    counts = {"tests": str(len(verdicts)), "failures": failures, "errors": "0", "time": seconds}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "lastcall rehearse", **counts})
    for verdict in verdicts:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {"classname": _xml(target), "name": verdict.scene.name, "time": f"{verdict.seconds:.3f}"},
        )
        if verdict.problems:
            failure = ElementTree.SubElement(case, "failure", {"message": _xml(verdict.problems[0])})
            failure.text = _xml("\n".join(verdict.problems))
        if verdict.warnings or verdict.output:
            output = ElementTree.SubElement(case, "system-out")
            output.text = _xml("\n".join([*verdict.warnings, verdict.output]))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _xml(text: str) -> str:
    """Replace what XML can't hold: workers may write anything."""
    return "".join(c if c in "\t\n" or (c >= " " and c not in "\ufffe\uffff") else "\ufffd" for c in text)
