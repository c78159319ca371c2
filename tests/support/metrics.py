"""The metrics that a supervisor exports, as a scrape sees them."""

from __future__ import annotations

import asyncio
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tests.support.harness import Run


class Samples(dict[str, list[tuple[dict[str, str], float]]]):
    """Every sample of an exposition, by name."""

    @classmethod
    def of(cls, text: str) -> Samples:
        samples = cls()
        for family in text_string_to_metric_families(text):
            assert family.documentation, family.name
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
        return samples

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples that have these labels; there must be one."""
        values = [value for found, value in self[name] if labels.items() <= found.items()]
        assert values, (name, labels)
        return sum(values)


async def scrape(r: Run) -> Samples:
    """Return every sample of /metrics."""
    address = r.log("supervisor started")[0]["http"]

    def get() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    return Samples.of(await asyncio.to_thread(get))
