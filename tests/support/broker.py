"""A broker in the process of the test, with its pool and a local Inworld server behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from lastcall.worker.inworld.broker.broker import Broker, listen
from lastcall.worker.local.inworld_server import Speech
from tests.support.inworld import Pair, pair
from tests.support.inworld_job import Job

TOKEN = "a-local-token"
SPEAKING = Speech(pace="real-time")
LONG = "This goes on and on. " * 40


@dataclass(slots=True, kw_only=True)
class Setting:
    """An Inworld server, a pool of it, a broker of that."""

    pair: Pair
    broker: Broker

    def job(self, token: str = TOKEN) -> Job:
        return Job(self.broker.ws_url, token)


@asynccontextmanager
async def brokered(*, max_unread: int = 1 << 24, **options: Any) -> AsyncIterator[Setting]:
    async with pair(**options) as p:
        with listen() as listener:
            broker = Broker(
                p.pool,
                listener,
                token=TOKEN,
                key=p.server.api_key,
                base_url=p.server.base_url,
                max_unread=max_unread,
            )
            async with broker:
                yield Setting(pair=p, broker=broker)
