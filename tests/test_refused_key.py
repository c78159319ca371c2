"""A LiveKit server that refuses the API key is one line of the worker's log."""

from __future__ import annotations

import logging
from typing import Any

import aiohttp
import pytest

from lastcall.worker import refused_key
from lastcall.worker.local.livekit_server import DispatchServer


@pytest.mark.parametrize("how", ["error", "exc_info"])
async def test_a_refused_key_is_said_once(caplog: pytest.LogCaptureFixture, how: str) -> None:
    """With the status, the host and the variables to check; livekit-agents' lines stay as they are."""
    async with DispatchServer() as server, aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.WSServerHandshakeError) as raised:
            await session.ws_connect(f"{server.url}/agent", headers={"Authorization": "Bearer wrong"})
    logger = logging.getLogger("test.refused_key")
    logger.addFilter(refused_key.RefusedKey())
    error = raised.value
    more: dict[str, Any] = {"extra": {"error": error}} if how == "error" else {"exc_info": error}
    logger.warning("unreachable", extra={"error": ConnectionRefusedError()})
    for _ in range(3):
        logger.warning("failed to connect to livekit, retrying in 0s", **more)
    (said,) = [record for record in caplog.records if record.name == "lastcall.worker"]
    assert "LIVEKIT_API_KEY and LIVEKIT_API_SECRET" in said.getMessage()
    assert (said.__dict__["status"], said.__dict__["host"]) == (401, "127.0.0.1")
    assert len([record for record in caplog.records if record.name == logger.name]) == 4
