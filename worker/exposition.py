"""livekit-agents' own metrics of this worker, as text for the supervisor's scrape."""

from __future__ import annotations

import os

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

PREFIX = "lk_agents"
# Half of a control message (`wire.MAX_LINE_BYTES`): JSON escapes each quote and newline of the text.
MAX_TEXT_BYTES = 128 * 1024


class _Only:
    """The part of a registry whose names begin with the prefix."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> list[object]:
        return [family for family in self._registry.collect() if family.name.startswith(PREFIX)]


def text() -> str:
    """Return the exposition, job processes included where a multiprocess directory is in use.

    Empty when it would be too long for a message.
    """
    registry: CollectorRegistry = REGISTRY
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    exposition = generate_latest(_Only(registry)).decode()  # type: ignore[arg-type]  # collect() is all it needs
    return exposition if len(exposition) <= MAX_TEXT_BYTES else ""
