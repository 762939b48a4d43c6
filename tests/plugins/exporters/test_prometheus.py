"""The page's text, letter by letter, and as Prometheus' own parser reads it."""

from prometheus_client.parser import text_string_to_metric_families

from core.interfaces.metrics import ExporterContext, Histogram, MetricFamily, Point
from core.plugin.hookspecs import NoOptions
from plugins.exporters.prometheus import Prometheus

HISTOGRAM = Histogram(("m",), (0.5, 1.0), (2, 0, 3), 9.5)
FAMILIES = [
    MetricFamily("n_alive", "gauge", "1 while it runs.", ("model",), [Point(("m",), True)]),
    MetricFamily("n_steps", "counter", "Steps.", ("model",), [Point(("m",), 7)]),
    MetricFamily("n_why", "counter", "By why.", ("why",), [Point(('a "b"\n',), 2)]),
    MetricFamily("n_none", "counter", "Nothing yet.", ("why",)),
    MetricFamily("n_s", "histogram", "Seconds.", ("model",), (), [HISTOGRAM]),
]
TEXT = """\
# HELP n_alive 1 while it runs.
# TYPE n_alive gauge
n_alive{model="m"} 1.0
# HELP n_steps_total Steps.
# TYPE n_steps_total counter
n_steps_total{model="m"} 7.0
# HELP n_why_total By why.
# TYPE n_why_total counter
n_why_total{why="a \\"b\\"\\n"} 2.0
# HELP n_none_total Nothing yet.
# TYPE n_none_total counter
# HELP n_s Seconds.
# TYPE n_s histogram
n_s_bucket{le="0.5",model="m"} 2.0
n_s_bucket{le="1.0",model="m"} 2.0
n_s_bucket{le="+Inf",model="m"} 5.0
n_s_count{model="m"} 5.0
n_s_sum{model="m"} 9.5
"""


def test_the_page():
    exporter = Prometheus(NoOptions(), ExporterContext(model_name="m"))
    page = exporter.render(FAMILIES).decode()
    assert page == TEXT
    read = {family.name: family for family in text_string_to_metric_families(page)}
    assert read["n_why"].samples[0].labels == {"why": 'a "b"\n'}
    assert exporter.path == "/metrics"
    assert exporter.content_type.startswith("text/plain")
