"""The variables by which a worker's processes find the machine's broker, as arguments of the plugin's TTS."""

from __future__ import annotations

from collections.abc import Mapping

from lastcall.worker.base import variables

_ARGUMENTS = {
    "ws_url": variables.INWORLD_WS_URL,
    "base_url": variables.INWORLD_URL,
    "api_key": variables.INWORLD_TOKEN,
}


def broker_arguments(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the arguments that point a TTS at the broker; none where there is no broker.

    The token is among them: an agent's `load_dotenv(override=True)` may have put the real key back into
    INWORLD_API_KEY, and the broker knows its own token only.
    """
    if not environ.get(variables.INWORLD_WS_URL):
        return {}
    return {name: environ[variable] for name, variable in _ARGUMENTS.items() if environ.get(variable)}
