"""Tests that need more than Python: which can run here, and one line about those that can't."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lastcall"
PROMTOOL = CACHE / "promtool"
CHROMIUM = "chromium"
BIN = Path(sys.executable).parent
SUITES = ("trixie", "bookworm")


def missing(marker: str) -> str:
    """Return why tests of a marker can't run here; empty when they can."""
    if marker == "lint":
        tools = [
            name
            for name in ("shellcheck", "hadolint", "check-jsonschema", "kubectl")
            if not (BIN / name).exists()
        ]
        tools += [] if importlib.util.find_spec("kubernetes_validate") else ["kubernetes-validate"]
        return f"no {', '.join(tools)} in the virtual environment" if tools else ""
    if marker == "promtool":
        return "" if PROMTOOL.exists() else f"no {PROMTOOL}"
    if marker == "browser":
        absent = [] if shutil.which(CHROMIUM) else [CHROMIUM]
        absent += [] if importlib.util.find_spec("playwright") else ["playwright"]
        return f"no {', '.join(absent)}" if absent else ""
    if os.getuid() != 0:
        return "not root"
    programs = {"systemd": ["systemd-nspawn", "nsenter"], "container": ["podman", "runc"]}[marker]
    absent = [name for name in programs if shutil.which(name) is None]
    absent += [str(CACHE / suite) for suite in SUITES if not (CACHE / suite / ".stamp").exists()]
    return f"no {', '.join(absent)}" if absent else ""


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what can't run, and remember why."""
    lines = []
    for marker in ("lint", "promtool", "browser", "systemd", "container"):
        marked = [item for item in items if item.get_closest_marker(marker)]
        why = missing(marker) if marked else ""
        if why:
            lines.append(f"{len(marked)} {marker} tests ({why})")
            config.hook.pytest_deselected(items=marked)
            items[:] = [item for item in items if item not in marked]
    config.stash[LINES] = lines


LINES = pytest.StashKey[list[str]]()


def say(terminalreporter: pytest.TerminalReporter) -> None:
    """Write the one line about what was left out, if anything was."""
    lines = terminalreporter.config.stash.get(LINES, [])
    if lines:
        terminalreporter.write_line(f"left out: {'; '.join(lines)}; scripts/fixtures sets up what they need")
