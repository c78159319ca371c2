"""The workers' own metrics beside the supervisor's, told apart by slot and generation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from lastcall.supervisor.fleet.generation import Generation


class WorkerMetrics:
    """A collector over what the generations last sent; the same family of several workers is one family."""

    def __init__(self, generations: Iterable[Generation]) -> None:
        self._generations = list(generations)

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for generation in self._generations:
            labels = {"slot": str(generation.slot), "generation": str(generation.number)}
            for family in self._read(generation):
                joined = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    joined.samples.append(sample._replace(labels={**sample.labels, **labels}))
        yield from families.values()

    @staticmethod
    def _read(generation: Generation) -> list[Metric]:
        """Read the text of one worker; a text that is none leaves out that worker alone, and is logged."""
        try:
            return list(text_string_to_metric_families(generation.reports.metrics))
        except Exception as error:  # the parser raises whatever a text makes it stumble over
            generation.reports.metrics = ""
            generation.log.warning("metrics of the worker can't be read", reason=repr(error))
            return []
