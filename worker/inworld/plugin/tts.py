"""`lastcall.inworld.TTS`: the plugin's class, with the machine's pool as the default address.

Under lastcall the plugin's own class has that default too (`attached`). This one also has it in a process
that lastcall did not start, next to a broker that runs alone.
"""

from __future__ import annotations

from typing import Any

from lastcall.worker.inworld.plugin import (
    attached,  # noqa: F401  # in place before the plugin is imported
    private_names,
)

# Any: livekit-agents' packages are not type-checked here, their types differ between the supported versions.
Base: Any = private_names.load().TTS


class TTS(Base):  # type: ignore[misc]  # the plugin's class is known at run time only
    """Inworld text-to-speech. Takes the arguments of `livekit.plugins.inworld.TTS`, in the same units.

    Under `lastcall run` with `[inworld] enabled = true` it speaks through the pool of the machine. A TTS that
    is given a `ws_url` or `base_url`, or the API key of another account, goes there directly.

    Raises ValueError, as the plugin's class does, where no API key is known. Since 0.2.0.
    """

    def __init__(self, **arguments: Any) -> None:
        """Construct the plugin's class, whose constructor finds the pool."""
        super().__init__(**arguments)
