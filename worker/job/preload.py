"""The first module that a forkserver imports: it stops automatic garbage collections there.

Each process that the forkserver forks collects garbage from its first instruction on.
"""

from lastcall.worker.base import garbage

garbage.collect_in_forks_only()
