"""Who may import whom, and where foreign names may stand. Read from the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

FLOORS = {
    "worker": [
        {"errors", "clock", "wire", "settings"},
        {
            "stopping",
            "shield",
            "loading",
            "resources",
            "output",
            "jobs",
            "jobend",
            "compat_jobs",
            "compat_process",
            "exposition",
            "scratch",
        },
        {"control", "compat", "livekit_engine", "inworld"},
        {"host", "jobside"},
        {"__main__"},
    ],
    "worker.inworld": [
        {
            "environment",
            "errors",
            "states",
            "timings",
            "backoff",
            "splitting",
            "census",
            "outbox",
            "logs",
            "alarm",
        },
        {"plugin_compat", "protocol", "slots", "idling", "dialling"},
        {"closer", "tts", "context"},
        {"attached", "connection", "stream"},
        {"closing"},
        {"pool", "passthrough"},
        {"client"},
        {"broker"},
        {"companion"},
        {"__main__"},
    ],
    "supervisor": [
        {"errors", "states"},
        {"config", "budget", "intensity", "receipt", "histogram"},
        {
            "inbox",
            "process",
            "reaper",
            "channel",
            "sink",
            "relay",
            "family",
            "logs",
            "launch",
            "reports",
            "notify",
            "cgroup",
            "surroundings",
        },
        {"stopper"},
        {"generation", "companion", "program"},
        {"slot"},
        {"fleet"},
        {"operations", "watch", "joined"},
        {"status", "metrics", "health", "control_api", "table", "verbs"},
        {"shutdown", "announcer"},
        {"app"},
        {"local", "demo", "dev"},
        {"asking", "deployment"},
        {"cli"},
        {"__main__"},
    ],
}
# Folders of the supervisor's own that stand on a floor as one; what is in them is checked with them.
FOLDERS = {"platforms": 2, "rehearsal": 8, "doctor": 8}
# The status document is made from the countdown, which is a plain value of the floor above.
EXCEPTIONS = {("supervisor", "status", "shutdown")}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each imported module's full name; relative ones are resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if node.module is None or name in ("worker", "supervisor"):
                yield from ((f"{name}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield name, node.lineno


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package.replace(".", "/")).glob("*.py"))


def within(package: str, name: str) -> str | None:
    """Return the module or package directly in `package` that an imported name lies in."""
    rest = name.removeprefix(package + ".")
    return None if rest == name else rest.split(".")[0]


def test_folders_stand_on_their_floor() -> None:
    """What is in a folder imports from below the folder's floor, or from beside itself."""
    floor = FOLDERS | {name: n for n, names in enumerate(FLOORS["supervisor"]) for name in names}
    found = {path.parent.name for path in (ROOT / "supervisor").glob("*/__init__.py")}
    assert found == set(FOLDERS)
    for folder, height in FOLDERS.items():
        for path in (ROOT / "supervisor" / folder).glob("*.py"):
            for name, line in imports(path):
                package, *parts = name.split(".")
                if package == "supervisor" and parts[0] != folder:
                    assert floor[parts[0]] <= height, f"{path}:{line} imports {name}"


def test_floors() -> None:
    """A module imports only from its own floor and those below; every module has a floor."""
    for package, floors in FLOORS.items():
        floor = {name: n for n, names in enumerate(floors) for name in names}
        found = {path.stem for path in modules(package)} - {"__init__"}
        found |= {name.removeprefix(package + ".") for name in FLOORS if name.startswith(package + ".")}
        assert found == set(floor), found ^ set(floor)
        floor |= FOLDERS if package == "supervisor" else {}
        for path in modules(package):
            for name, line in imports(path):
                module = within(package, name)
                if module is None or path.stem == "__init__" or (package, path.stem, module) in EXCEPTIONS:
                    continue
                assert floor[module] <= floor[path.stem], f"{path.name}:{line} imports {name}"
        for path in (path for inner in FLOORS if inner.startswith(package + ".") for path in modules(inner)):
            for name, line in imports(path):
                module = within(package, name)
                if module is not None:
                    own = within(package, ".".join(path.relative_to(ROOT).parts))
                    assert own and floor[module] <= floor[own], f"{path.name}:{line} imports {name}"


def test_no_cycles() -> None:
    """Within each package the imports form no circle."""
    for package in FLOORS:
        graph = {
            path.stem: {module for name, _ in imports(path) if (module := within(package, name))}
            for path in modules(package)
        }
        order: list[str] = []
        while graph:
            free = [module for module, below in graph.items() if not below & graph.keys()]
            assert free, f"a circle among {sorted(graph)}"
            order += free
            for module in free:
                del graph[module]
        assert len(order) == len(modules(package))


def test_worker_never_imports_supervisor() -> None:
    """Nor does the supervisor import livekit, or more of the worker than the wire, the clock and errors."""
    for path in (ROOT / "worker").rglob("*.py"):
        assert not any(name.split(".")[0] == "supervisor" for name, _ in imports(path)), path
    for path in (ROOT / "supervisor").rglob("*.py"):
        for name, line in imports(path):
            assert name.split(".")[0] != "livekit", f"{path}:{line}"
            if name.startswith("worker"):
                assert name in ("worker.wire", "worker.clock", "worker.errors"), f"{path}:{line} {name}"


def test_one_edge_each() -> None:
    """psutil, private livekit names and multiprocessing's private names stand in one module each."""
    for path in [*(ROOT / "worker").rglob("*.py"), *(ROOT / "supervisor").rglob("*.py")]:
        names = {name.split(".")[0] for name, _ in imports(path)}
        if path.name != "family.py":
            assert "psutil" not in names, path
        edges = {"compat.py", "compat_jobs.py", "compat_process.py", "plugin_compat.py"}
        if path.parent.name != "local" and path.name not in edges:
            assert "livekit" not in names, path
