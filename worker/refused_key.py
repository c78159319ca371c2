"""Say once, in plain words, that the LiveKit server refuses the API key.

livekit-agents logs each failed connection as a warning with an exception, and tries again for minutes. Its
record has the exception as `error` (1.8) or as `exc_info`.
"""

from __future__ import annotations

import logging

import aiohttp

log = logging.getLogger("lastcall.worker")

# The logger of livekit-agents.
LIVEKIT = "livekit.agents"
# Statuses of a refused key: pkg/service/agentservice.go of livekit-server has 401, proxies may have 403.
REFUSED = (401, 403)


class RefusedKey(logging.Filter):
    """A filter that lets every record through, and logs an error at the first refusal of the key."""

    def __init__(self) -> None:
        super().__init__()
        self._was_said = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Look at a record of livekit-agents."""
        error = getattr(record, "error", None) or (record.exc_info or (None, None))[1]
        if isinstance(error, aiohttp.WSServerHandshakeError) and error.status in REFUSED:
            self._say(error)
        return True

    def _say(self, error: aiohttp.WSServerHandshakeError) -> None:
        if not self._was_said:
            self._was_said = True
            log.error(
                "the LiveKit server refuses the API key: check LIVEKIT_API_KEY and LIVEKIT_API_SECRET,"
                " and the clock",
                extra={"status": error.status, "host": error.request_info.url.host},
            )


def watch() -> None:
    """Look at what livekit-agents logs from now on."""
    logging.getLogger(LIVEKIT).addFilter(RefusedKey())
