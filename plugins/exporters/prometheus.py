"""GET /metrics, in the text form that Prometheus scrapes. Knows nothing of what is counted."""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from core.interfaces.metrics import ExporterContext, Histogram, MetricFamily
from core.plugin.hookspecs import NoOptions


class Prometheus:
    """Implements core.interfaces.metrics.ScrapeExporter."""

    path = "/metrics"
    content_type = CONTENT_TYPE_LATEST

    def __init__(self, options: NoOptions, context: ExporterContext) -> None:
        pass

    def render(self, families: Sequence[MetricFamily]) -> bytes:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families(families))
        return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Sequence[MetricFamily]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return map(_metric, self._families)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry would look for names that are there twice."""
        return ()


def _metric(family: MetricFamily) -> Metric:
    if family.kind == "histogram":
        shown = HistogramMetricFamily(family.name, family.help, labels=family.label_names)
        for histogram in family.histograms:
            shown.add_metric(histogram.labels, list(_cumulative(histogram)), histogram.total)
        return shown
    cls = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    plain = cls(family.name, family.help, labels=family.label_names)
    for point in family.points:
        plain.add_metric(point.labels, point.value)
    return plain


def _cumulative(histogram: Histogram) -> Iterator[tuple[str, float]]:
    count = 0
    bounds = [*map(repr, histogram.bounds), "+Inf"]
    for bound, more in zip(bounds, histogram.counts, strict=True):
        count += more
        yield bound, count
