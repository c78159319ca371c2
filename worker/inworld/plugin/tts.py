"""`lastcall.inworld.TTS`: the plugin's class, pointed at the machine's pool when there is one.

An agent changes one import line: `from lastcall.inworld import TTS` in place of `inworld.TTS`. Outside
lastcall, and where the pool is off, the class is the plugin's with the plugin's defaults.
"""

from __future__ import annotations

import os
from typing import Any

from lastcall.worker.inworld.plugin import private_names
from lastcall.worker.inworld.plugin.arguments import broker_arguments

Base: Any = private_names.load().TTS


class TTS(Base):  # type: ignore[misc]  # the plugin's class is known at run time only
    """The plugin's TTS; takes the same arguments, and those given win over the pool's address."""

    def __init__(self, **arguments: Any) -> None:
        defaults = broker_arguments(os.environ)
        if "ws_url" not in arguments and "api_key" in defaults:
            # The address is the broker's, which takes no key but its token.
            arguments["api_key"] = defaults["api_key"]
        super().__init__(**{**defaults, **arguments})
