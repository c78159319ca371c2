"""Keep Python's cyclic garbage collector from running while a process imports.

Importing livekit-agents allocates objects that all stay. Each automatic collection walks them and finds no
garbage. That takes 15 % of the processor time of `import livekit.agents` 1.8.9 in CPython 3.11: medians of
three are 2.40 s with collections and 1.94 s without. A threshold of 0 stops automatic collections and leaves
`gc.isenabled()` as the agent has set it.

A forkserver collects nothing, and every process that it forks collects, whatever the process is: a job, the
inference process of livekit-agents, or one that the agent has started by multiprocessing.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_threshold = gc.get_threshold()


def stop_collecting() -> None:
    """Stop automatic collections in this process, until `collect_again`."""
    gc.set_threshold(0)


def collect_again() -> None:
    """Restore the threshold, unless the agent's modules have set another."""
    if gc.get_threshold()[0] == 0:
        gc.set_threshold(*_threshold)


def collect_in_forks_only() -> None:
    """Stop automatic collections in this process, but not in the processes that it forks. To call once.

    A fork inherits the objects that are there frozen, as the page of `gc.freeze` advises: no collection walks
    them, so the processes go on to share their memory.
    """
    server = os.getpid()
    is_by_server = False

    def before() -> None:
        nonlocal is_by_server
        # The forks inherit these functions, and what they fork in turn is the agent's matter.
        is_by_server = os.getpid() == server
        if is_by_server:
            gc.freeze()

    def after_in_child() -> None:
        if is_by_server:
            collect_again()

    stop_collecting()
    os.register_at_fork(before=before, after_in_child=after_in_child)


@contextmanager
def no_collections() -> Iterator[None]:
    """Run the block without automatic collections."""
    stop_collecting()
    try:
        yield
    finally:
        collect_again()
