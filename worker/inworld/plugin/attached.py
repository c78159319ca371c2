"""This process's one `PluginConnections`, attached to the Inworld plugin as soon as that is imported.

The import of this module is what attaches it. A call would come too late: a job process imports the agent's
module, with a TTS object at its top level, before any function of lastcall is called there, and the
forkserver runs only a list of modules to import before that.
"""

from __future__ import annotations

from lastcall.worker.inworld.plugin.connections import PluginConnections
from lastcall.worker.inworld.plugin.private_names import PACKAGE
from lastcall.worker.sdk import job_process

plugin_connections = PluginConnections()
job_process.on_plugin(PACKAGE, plugin_connections.attach)
