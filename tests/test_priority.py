"""The priority of a process that is made beside live calls, and of its forks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lastcall.supervisor.processes.priority import LOW, ORDINARY, set_nice
from tests.support.harness import nice_of

# Forks when it is told to, as an image does. The fork leads a session.
FORKS = """
import os, sys
sys.stdin.readline()
if not os.fork():
    os.setsid()
    print(os.getpid(), flush=True)
    sys.stdin.readline()
"""


def test_forks_have_the_ordinary_priority() -> None:
    """A process with a low priority, whose session is not that of its fork, does not pass the priority on."""
    if nice_of("self") is None:
        pytest.skip("the kernel has no autogroups")
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as low:
        assert low.stdin is not None and low.stdout is not None
        set_nice(low.pid, LOW)
        assert nice_of(low.pid) == LOW
        low.stdin.write("fork\n")
        low.stdin.flush()
        assert nice_of(int(low.stdout.readline())) == ORDINARY
        low.stdin.close()
    set_nice(low.pid, ORDINARY)  # it has ended
