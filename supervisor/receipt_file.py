"""Writes a receipt where the user wants it, within a bound."""

from __future__ import annotations

import errno
import os
import select
import time
from pathlib import Path
from typing import Any

from lastcall.supervisor.receipt import textfile
from lastcall.worker.base.clock import now

# Seconds that a pipe or a device has to take the receipt. Ours: a reader that is there reads within
# milliseconds, and the end of a stop waits for no other.
TAKEN_WITHIN = 1.0
# Seconds between two looks for a reader.
LOOK_AGAIN_AFTER = 0.02
# node_exporter has another user, and the umask of a unit is 0077. No secret is in the figures.
FIGURES_MODE = 0o644


def is_special(path: Path) -> bool:
    """Tell whether a path is a pipe or a device, which is written to and not replaced."""
    return path.exists() and not path.is_file()


def write_figures(path: Path, document: dict[str, Any]) -> None:
    """Write the textfile beside a receipt, unless the receipt is a pipe or a device. Raises OSError."""
    if is_special(path):
        return
    # The label is UTF-8, and the bytes of a path need not be.
    label = os.fsencode(os.path.abspath(path)).decode(errors="replace")
    figures = textfile.text_of(document, label, time.time())
    write_whole(Path(f"{path}{textfile.SUFFIX}"), figures, mode=FIGURES_MODE)


def write_whole(path: Path, text: str, within: float = TAKEN_WITHIN, mode: int | None = None) -> None:
    """Write a file at once: a reader sees the old text or the new one, never half of one.

    `mode` are the permissions of a regular file, in place of those that the umask leaves.
    Raises OSError; a pipe that nobody reads, or not to the end, is one after `within` seconds.
    """
    if is_special(path):
        _write_special(path, text.encode(), now() + within)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        if mode is not None:
            temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_special(path: Path, data: bytes, due: float) -> None:
    fd = _open(path, due)
    try:
        waiting = select.poll()
        waiting.register(fd, select.POLLOUT)
        while data:
            if not waiting.poll(max(0.0, due - now()) * 1000):
                raise TimeoutError(errno.ETIMEDOUT, "the reader does not read on")
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:
                continue  # room for less than the kernel writes at once
    finally:
        os.close(fd)


def _open(path: Path, due: float) -> int:
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if now() >= due:
                raise OSError(errno.ENXIO, "nobody reads the pipe") from None
        time.sleep(LOOK_AGAIN_AFTER)
