"""One metric: its name, kind, labels and meaning, written once for the exposition and for docs/metrics.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from lastcall.worker.base.records import dataclass

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

Kind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A metric of lastcall. `text` says what is measured, as a phrase, and names values in backquotes."""

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()

    @property
    def exposed_name(self) -> str:
        """The name that a query has."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    @property
    def help(self) -> str:
        """The text as a sentence, without marks."""
        text = self.text.replace("`", "")
        return f"{text[:1].upper()}{text[1:]}."

    def of(self, value: float) -> CounterMetricFamily | GaugeMetricFamily:
        """Return the only sample, of a counter or a gauge without labels."""
        return self.by([((), value)])

    def by(self, samples: Iterable[tuple[Sequence[str], float]]) -> CounterMetricFamily | GaugeMetricFamily:
        """Return samples of a counter or a gauge, each with the values of its labels in their order."""
        # Not above: a supervisor that nobody scrapes never loads it, nor does the end of a stop.
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        make = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = make(self.name, self.help, labels=self.labels)
        for values, value in samples:
            family.add_metric(values, value)
        return family

    def spread(self, buckets: Sequence[tuple[str, float]], total: float) -> HistogramMetricFamily:
        """Return a histogram of the buckets, with the sum of all values."""
        from prometheus_client.core import HistogramMetricFamily

        return HistogramMetricFamily(self.name, self.help, buckets=buckets, sum_value=total)
