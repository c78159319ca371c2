"""This process's one `PluginConnections`, attached to the Inworld plugin as soon as that is imported.

The import of this module attaches the object, because a call would come too late. A job process imports the
agent's module, which may make a TTS object at its top level, before any function of lastcall is called.
Before that the forkserver only imports a list of modules.
"""

from __future__ import annotations

from lastcall.worker.inworld.plugin.connections import PluginConnections
from lastcall.worker.inworld.plugin.private_names import PACKAGE
from lastcall.worker.sdk import job_process

plugin_connections = PluginConnections()
job_process.on_plugin(PACKAGE, plugin_connections.attach)
