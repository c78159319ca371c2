"""The first module that a forkserver imports: it stops automatic garbage collections there.

A job process is forked without them, imports the agent's module, and collects again from `Setup` on.
"""

from lastcall.worker.base import garbage

garbage.stop_collecting()
