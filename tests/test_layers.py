"""The rules of imports between modules, and the places of foreign names. Read from the imports."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

from tests.support.layers import ROOMS, SAME_NAME_ALLOWED, floors_of
from tests.support.sources import nodes_of

ROOT = Path(__file__).parent.parent
# The modules of lastcall that use each foreign package; a module that is not listed may not import it.
EDGES = {
    "psutil": {"lastcall.supervisor.processes.descendants"},
    "livekit": {
        "lastcall.worker.sdk.agent_server",
        "lastcall.worker.sdk.job_process",
        "lastcall.worker.sdk.child_processes",
        "lastcall.worker.sdk.process_pool",
        "lastcall.worker.inworld.plugin.private_names",
        "lastcall.worker.local.livekit_server",
        "lastcall.worker.local.participants",
        "lastcall.worker.local.room",
        "lastcall.worker.local.room_server",
        "lastcall.worker.local.rooms",
        "lastcall.worker.local.ticks",
        "lastcall.worker.local.twirp",
        "lastcall.worker.local.sample",
        "lastcall.worker.room_service",
        # The public names of livekit alone, in a job.
        "lastcall.worker.job.arriving",
        "lastcall.worker.job.deletions",
        "lastcall.worker.job.leaving",
        "lastcall.worker.job.session",
        "lastcall.worker.job.session_state",
        "lastcall.worker.job.session_voice",
        # In the process of the verb `doctor`, which supervises nothing.
        "lastcall.supervisor.doctor.probe",
    },
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, Path]:
    """Return every module of the package by its full name, `__init__` under the name of its package."""
    links = [ROOT / "lastcall" / name for name in ("supervisor", "worker")]
    paths = [*(ROOT / "lastcall").glob("*.py"), *(path for link in links for path in link.rglob("*.py"))]
    return {name_of(path): path for path in paths}


@cache
def imports(path: Path) -> list[tuple[str, int]]:
    """Return each imported module's full name, in functions too; relative imports are resolved."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{name}.{alias.name}"
                found.append((full if full in sources() else name, node.lineno))
    return found


def test_every_module_has_a_floor() -> None:
    """The table of rooms lists every module and sub-package, and nothing that is not there."""
    found = defaultdict(set)
    for name, path in sources().items():
        if name != "lastcall":
            room, _, leaf = name.rpartition(".")
            found[room].add(leaf)
        if path.name == "__init__.py":
            found[name] |= set()
    assert set(found) == set(ROOMS)
    for room, names in found.items():
        assert names == set(floors_of(room)), room


def test_no_arrow_points_upwards() -> None:
    """A module imports from the same floor and from lower ones, in its room and in every room around it."""
    known = sources()
    for module, path in known.items():
        for name, line in imports(path):
            if name not in known or path.name == "__init__.py":
                continue
            one, other = module.split("."), name.split(".")
            depth = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            if depth is None:
                continue  # a package itself, whose __init__ imports nothing
            floor = floors_of(".".join(one[:depth]))
            assert floor[other[depth]] <= floor[one[depth]], f"{path}:{line} imports {name}"


def test_no_circles() -> None:
    """In each room the imports among its modules and sub-packages form no circle."""
    known = sources()
    for room in ROOMS:
        graph: dict[str, set[str]] = {leaf: set() for leaf in floors_of(room)}
        prefix = room + "."
        for module, path in known.items():
            if not module.startswith(prefix) or path.name == "__init__.py":
                continue
            own = module.removeprefix(prefix).split(".")[0]
            for name, _ in imports(path):
                if name.startswith(prefix):
                    graph[own].add(name.removeprefix(prefix).split(".")[0])
        for leaf, below in graph.items():
            below.discard(leaf)
        while graph:
            free = [leaf for leaf, below in graph.items() if not below & graph.keys()]
            assert free, f"a circle among {sorted(graph)} of {room}"
            for leaf in free:
                del graph[leaf]


def test_one_name_stands_for_one_module() -> None:
    """No two modules or rooms share a name, but for a room and the main module in it."""
    places = defaultdict(list)
    for name in sources():
        places[name.rpartition(".")[2]].append(name)
    for leaf, names in places.items():
        if leaf == "__main__" or leaf in SAME_NAME_ALLOWED:
            continue
        room, *inside = sorted(names, key=len)
        assert inside in ([], [f"{room}.{leaf}"]), names


def test_one_import_name() -> None:
    """Nothing imports `worker` or `supervisor`; the supervisor imports of the worker's side only the base."""
    known = sources()
    files = [*known.values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    for path in files:
        for name, line in imports(path):
            assert name.split(".")[0] not in ("worker", "supervisor"), f"{path}:{line}"
    for module, path in known.items():
        for name, line in imports(path):
            if module.startswith("lastcall.worker"):
                assert not name.startswith("lastcall.supervisor"), f"{path}:{line} imports {name}"
            elif module.startswith("lastcall.supervisor") and name.startswith("lastcall.worker"):
                # The demo runs the sample agent that lies beside the local servers.
                base = name.startswith("lastcall.worker.base.") or name == "lastcall.worker.local"
                assert base, f"{path}:{line} imports {name}"


def test_one_edge_each() -> None:
    """psutil and livekit are imported where the table says, and nowhere else."""
    known = sources()
    for package, allowed in EDGES.items():
        found = {
            module
            for module, path in known.items()
            for name, _ in imports(path)
            if name.split(".")[0] == package
        }
        assert found == allowed, found ^ allowed
