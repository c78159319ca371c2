"""The way of a TTS: to the machine's broker or beside it, and with which arguments.

    a URL that the agent gives    beside the pool, with the arguments of the agent
    the key of another account    the same
    all others                    to the broker, with the agent's key; without one, with the local token

The token is for the broker alone. A TTS that goes elsewhere never has it, and without a key it fails as it
would without lastcall.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lastcall.worker.base import variables
from lastcall.worker.base.inworld_keys import is_known

# Where a job tells the broker of a TTS that goes beside the pool, and why; the broker logs the text.
DIRECT_PATH = "/lastcall/direct"
DIRECT_REASONS = {
    "url": "the agent gives it a ws_url or a base_url",
    "key": "it has an API key that is not the pool's",
}
Reason = Literal["url", "key"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """The arguments of one TTS, and where it goes. `reason` says why that is beside the pool, if it is."""

    arguments: dict[str, Any] = field(repr=False)
    is_pooled: bool = False
    reason: Reason | None = None


def way_of(given: Mapping[str, Any], environ: Mapping[str, str]) -> Way:
    """Return the way of a TTS that an agent makes with these arguments."""
    arguments = dict(given)
    broker = {"ws_url": environ.get(variables.INWORLD_WS_URL), "base_url": environ.get(variables.INWORLD_URL)}
    token = environ.get(variables.INWORLD_TOKEN)
    if not (token and all(broker.values())):
        return Way(arguments=arguments)
    if any(arguments.get(name) not in (None, url) for name, url in broker.items()):
        return Way(arguments=arguments, reason="url")
    digests = environ.get(variables.INWORLD_KEYS)
    key = arguments.get("api_key")
    # Not a string: livekit-agents' NOT_GIVEN.
    key = (key if isinstance(key, str) else environ.get(variables.INWORLD_API_KEY, "")).strip() or token
    if digests is None:
        key = token  # a broker of an older version, which accepts no other key
    elif not is_known(key, token=token, digests=digests.split()):
        return Way(arguments=arguments, reason="key")
    return Way(arguments={**arguments, **broker, "api_key": key}, is_pooled=True)
