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
# Does what a shell with job control does for `stty tostop; COMMAND &`. The command has another process group
# than the shell, which keeps the foreground. The shell waits for the command and ends with its exit code.
_SHELL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
attributes = termios.tcgetattr(0)
attributes[3] |= termios.TOSTOP
termios.tcsetattr(0, termios.TCSANOW, attributes)
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)
    os.execv(sys.argv[1], sys.argv[1:])
while True:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
"""


class Terminal:
    """A pty. A supervisor has its foreground, or runs in the background of a shell, after `stty tostop`."""

    def __init__(self, *, in_background: bool = False) -> None:
        self.master, self.slave = pty.openpty()
        os.set_blocking(self.master, False)
        self.text = b""
        self.is_closed = False
        self._leash = _SHELL if in_background else _LEASH

    @property
    def leash(self) -> list[str]:
        return [sys.executable, "-c", self._leash]

    @property
    def attributes(self) -> list[Any]:
        """The settings of the terminal. A program that changes them has to put them back."""
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
