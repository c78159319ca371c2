"""Virtual environments with lastcall installed as users install it, made without a network.

The environments find lastcall's dependencies where the tests' own environment has them, and find lastcall
only where pip has put it.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def build(source: Path, kind: str, into: Path) -> Path:
    """Build a `wheel`, a `wheel:editable` or an `sdist` of a source tree, and return the archive."""
    done = hatchling(source, "build", "-t", kind, "-d", str(into))
    assert done.returncode == 0, done.stderr
    (made,) = into.iterdir()
    return made


def hatchling(source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the build backend that `pip install .` runs, in the tests' own environment."""
    return run(sys.executable, "-m", "hatchling", *arguments, cwd=source)


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and keep its output."""
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100, check=False)


def wheel_of(name: str, into: Path) -> Path:
    """Pack a distribution of the tests' environment into a wheel again, as its index would hand it out."""
    distribution = importlib.metadata.distribution(name)
    path = into / f"{name}-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in distribution.files or ():
            # pip has added the scripts, which lie outside of the packages, and the byte code.
            if ".." not in file.parts and file.suffix != ".pyc":
                wheel.write(Path(str(distribution.locate_file(file))), str(file))
    return path


class Installation:
    """A virtual environment with some wheels, and on request with all that the tests' environment has."""

    def __init__(self, directory: Path, *wheels: Path, dependencies: bool = True) -> None:
        venv.create(directory, with_pip=False, symlinks=True)
        self.bin = directory / "bin"
        self.python = self.bin / "python"
        self.site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(directory)}))
        for wheel in wheels:
            self._install(wheel)
        if dependencies:
            # A directory that a .pth file names comes last on the path, and Python reads no .pth file in it.
            # So the tests' lastcall stays out: an editable install is importable by a .pth file only. pip
            # installs nothing that is on the path already, so this file is written after the installations.
            places = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
            (self.site / "dependencies.pth").write_text("\n".join(sorted(places)))

    def _install(self, wheel: Path) -> None:
        """Install a wheel by pip, without its dependencies."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check"]
        done = run(*pip, "install", "-q", "--no-deps", "--no-index", str(wheel), cwd=self.bin)
        assert done.returncode == 0, done.stderr

    def execute(self, code: str, *, cwd: Path) -> str:
        """Run a line of Python in a fresh interpreter, and return what it printed."""
        done = run(self.python, "-c", code, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()
