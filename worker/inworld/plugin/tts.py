"""`lastcall.inworld.TTS`: the plugin's class, with the machine's pool as the default address.

An agent changes one import line: `from lastcall import inworld` in place of
`from livekit.plugins import inworld`. Outside lastcall, and where the pool is off, the class is the plugin's
class with the plugin's defaults.
"""

from __future__ import annotations

import os
from typing import Any

from lastcall.worker.inworld.plugin import private_names
from lastcall.worker.inworld.plugin.arguments import broker_arguments

# Any: livekit-agents' packages are not type-checked here, their types differ between the supported versions.
Base: Any = private_names.load().TTS


class TTS(Base):  # type: ignore[misc]  # the plugin's class is known at run time only
    """Inworld text-to-speech. Takes the arguments of `livekit.plugins.inworld.TTS`, in the same units.

    Under `lastcall run` with `[inworld] enabled = true` the defaults of `ws_url`, `base_url` and `api_key`
    are the addresses and the token of the machine's broker. An argument that is given wins over its default,
    with one exception: as long as `ws_url` is the broker's, `api_key` is the token.

    Raises ValueError, as the plugin's class does, where no API key is known. Since 0.2.0.
    """

    def __init__(self, **arguments: Any) -> None:
        """Fill in the address of the pool, if there is one, and construct the plugin's class."""
        defaults = broker_arguments(os.environ)
        if "ws_url" not in arguments and "api_key" in defaults:
            # The broker accepts no key but the token: it would refuse an API key that the agent has read from
            # a file.
            arguments["api_key"] = defaults["api_key"]
        super().__init__(**{**defaults, **arguments})
