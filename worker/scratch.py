"""The directory where multiprocessing keeps the forkserver's socket: gone when the worker is.

multiprocessing would make one of its own and remove it in the interpreter's end, which a worker does not wait
for. The supervisor gives one instead, and removes it itself after a worker that was killed.
"""

from __future__ import annotations

import shutil
from multiprocessing import process


def use(path: str) -> None:
    """Have multiprocessing use this directory. By a private name: where it is gone, it makes its own."""
    config = getattr(process.current_process(), "_config", None)
    if isinstance(config, dict):
        config["tempdir"] = path


def remove() -> None:
    """Remove the directory in use, if there is one. Nothing may need the forkserver any more."""
    config = getattr(process.current_process(), "_config", None)
    path = config.get("tempdir") if isinstance(config, dict) else None
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)
