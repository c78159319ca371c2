"""Every exception the supervisor raises on purpose."""

from __future__ import annotations

import errno

# The reasons of a system without room: for processes, memory, descriptors or files (errno(3)).
NO_ROOM = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT}


class SupervisorError(Exception):
    """Base of the errors below; the text is one line meant for the operator."""


class ConfigError(SupervisorError):
    """Raised when the configuration or the target is wrong: exit code 78."""


class UsageError(SupervisorError):
    """Raised when the command line is wrong: exit code 2."""


class Unreadable(SupervisorError):
    """Raised when a file that the user named can't be read; the text goes on where the file's name ends."""

    def __init__(self, text: str, *, is_absent: bool = False) -> None:
        super().__init__(text)
        self.is_absent = is_absent


class NotRunning(SupervisorError):
    """Raised by a verb that finds no supervisor to talk to: exit code 69."""


class Refused(SupervisorError):
    """Raised when a running supervisor can't do what it is asked to; the verb's exit code is 1."""


class SpawnError(SupervisorError):
    """Raised when a process can't be started at all: no such program, no permission, no process left.

    The OSError that was the reason is the cause of the exception.
    """

    @property
    def may_pass(self) -> bool:
        """Tell whether a later start may do better, because the system had no room for the process."""
        return isinstance(self.__cause__, OSError) and self.__cause__.errno in NO_ROOM


class TransitionError(SupervisorError):
    """Raised when code asks for a change of state that the table does not list: a fault of lastcall."""
