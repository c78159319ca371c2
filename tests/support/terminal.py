"""A terminal of a test's own: what a person sees, and the keys they press."""

from __future__ import annotations

import os
import pty
import sys
import termios
from typing import Any

# Gives a command the pty on its standard input as controlling terminal, as a shell would.
_LEASH = (
    "import fcntl,os,sys,termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A pty whose foreground process group is a supervisor's; typing ^C signals the whole group."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        os.set_blocking(self.master, False)
        self.text = b""
        self.is_closed = False

    @property
    def leash(self) -> list[str]:
        return [sys.executable, "-c", _LEASH]

    @property
    def attributes(self) -> list[Any]:
        """What a program may have changed, and has to have put back."""
        return termios.tcgetattr(self.slave)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def read(self) -> bytes:
        """Return everything shown so far."""
        if self.is_closed:
            return self.text
        try:
            while chunk := os.read(self.master, 65536):
                self.text += chunk
        except OSError:
            pass  # nothing more for now, or no program left on it
        return self.text

    def hang_up(self) -> None:
        """Close the window, if it is open."""
        if self.is_closed:
            return
        self.is_closed = True
        os.close(self.slave)
        os.close(self.master)
