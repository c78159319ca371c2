"""This process's one `Closer`, attached to the Inworld plugin as soon as that is imported.

Importing this module is what attaches it. It can't be a call: the user's module, with a TTS object at its
top level, is imported in a job process before any of our code is called there, and what the forkserver runs
for us before that is a list of modules to import.
"""

from __future__ import annotations

import os

from lastcall.worker.inworld.plugin.closer import Closer
from lastcall.worker.inworld.plugin.private_names import PACKAGE
from lastcall.worker.sdk import job_process

closer = Closer()
job_process.on_plugin(PACKAGE, lambda: closer.attach(os.environ))
