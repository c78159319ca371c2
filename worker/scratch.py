"""The directory where multiprocessing keeps the forkserver's socket: gone when the worker is.

multiprocessing would make a directory by itself and remove it at the end of the interpreter, which a worker
skips. The supervisor makes one for the worker instead, and removes it after a worker that was killed.
"""

from __future__ import annotations

import shutil
from multiprocessing import process


def use(path: str) -> None:
    """Have multiprocessing use this directory. Without the private name it goes on to make one."""
    config = getattr(process.current_process(), "_config", None)
    if isinstance(config, dict):
        config["tempdir"] = path


def remove() -> None:
    """Remove the directory in use, if there is one. Nothing may need the forkserver any more."""
    config = getattr(process.current_process(), "_config", None)
    path = config.get("tempdir") if isinstance(config, dict) else None
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)
