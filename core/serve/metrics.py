"""Counts and histograms of one server, for Prometheus.

Knows nothing of requests' contents. A token costs a bisection and three additions: the library's
own histogram costs ten times that, so plain numbers are kept and turned into metric families
when /metrics is asked.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from core.interfaces.frontend import Engine
from core.interfaces.http import HttpStats

CONTENT_TYPE = CONTENT_TYPE_LATEST.encode()
FIRST_TOKEN_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
NEXT_TOKEN_BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BOUNDS_S = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0,
)  # fmt: skip
MAX_FIELD_NAMES, MAX_FIELD_CHARACTERS = 64, 64
OTHER_FIELDS = "(other)"


# What the event loop may do in one piece is bounded by 20 ms.
BLOCKED_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class Buckets:
    """A histogram of plain numbers."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def cumulative(self) -> Iterator[tuple[str, float]]:
        count = 0
        for bound, n in zip((*self.bounds, float("inf")), self.counts, strict=True):
            count += n
            yield ("+Inf" if bound == float("inf") else repr(bound)), count


class Metrics(Collector):
    """Filled by the routes, read by /metrics. One thread."""

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        dropped_log_lines: Callable[[], int] = lambda: 0,
        http: HttpStats | None = None,
    ) -> None:
        self._engine = engine
        self._http = http or HttpStats()
        self._model_name = model_name
        self._dropped_log_lines = dropped_log_lines
        self.first_token_s = Buckets(FIRST_TOKEN_BOUNDS_S)
        self.next_token_s = Buckets(NEXT_TOKEN_BOUNDS_S)
        self.request_s = Buckets(REQUEST_BOUNDS_S)
        self.loop_blocked_s = Buckets(BLOCKED_BOUNDS_S)
        self.finished: Counter[str] = Counter()  # answers by finish reason, "abort" among them
        self.ignored_fields: Counter[str] = Counter()  # by name, of a bounded number of names
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def ignore(self, names: Iterable[str]) -> None:
        """Count fields of a request that had no effect. Clients choose the names, so that only
        the first of them have a series of their own."""
        for name in names:
            clean = name[:MAX_FIELD_CHARACTERS]
            full = len(self.ignored_fields) >= MAX_FIELD_NAMES
            known = clean in self.ignored_fields or not full
            self.ignored_fields[clean if known else OTHER_FIELDS] += 1

    def render(self) -> bytes:
        """The page at /metrics."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats
        pages = max(stats.kv_pages_total, 1)
        used = stats.kv_pages_total - stats.kv_pages_free - stats.kv_pages_cached
        yield self._gauge("num_requests_running", "Requests in the batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests not begun yet.", stats.num_waiting)
        yield self._gauge("num_requests_live", "As this frontend sees it.", self._engine.num_live)
        yield self._gauge("engine_alive", "1 while every worker runs.", self._engine.alive)
        yield self._gauge("kv_cache_usage_perc", "Pages in use, 0 to 1.", used / pages)
        yield self._gauge("kv_cache_pages", "Pages of the pool.", stats.kv_pages_total)
        yield self._gauge("kv_cache_pages_free", "Pages free now.", stats.kv_pages_free)
        yield self._gauge("kv_cache_pages_cached", "Pages only cached.", stats.kv_pages_cached)
        yield self._counter("num_preemptions", "Requests put back.", stats.num_preemptions)
        yield self._counter(
            "num_queue_timeouts", "Requests that waited too long.", stats.num_queue_timeouts
        )
        yield self._counter("engine_steps", "Steps of the engine.", stats.num_steps)
        yield self._counter("prompt_tokens", "Prompt tokens computed.", stats.prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generated_tokens)
        looked_up = stats.prompt_tokens + stats.cached_tokens
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", looked_up)
        yield self._counter("prefix_cache_hits", "Prompt tokens found.", stats.cached_tokens)
        dropped = self._dropped_log_lines()
        yield self._counter("log_lines_dropped", "Lines a log did not take.", dropped)
        yield from self._by_dp()
        yield from self._expert_loads()
        yield self._labelled("request_success", "Answers by reason of their end.", self.finished)
        yield from self._of_http()
        ignored = CounterMetricFamily(
            "nodeweave_ignored_fields", "Fields of requests without effect.", labels=["field"]
        )
        for name, count in self.ignored_fields.items():
            ignored.add_metric([name], count)
        yield ignored
        yield self._histogram("time_to_first_token_seconds", self.first_token_s)
        yield self._histogram("inter_token_latency_seconds", self.next_token_s)
        yield self._histogram("e2e_request_latency_seconds", self.request_s)
        yield self._histogram("event_loop_blocked_seconds", self.loop_blocked_s)

    def _of_http(self) -> Iterator[Metric]:
        http = self._http
        responses = CounterMetricFamily(
            "nodeweave_http_responses", "HTTP answers.", labels=["route", "status"]
        )
        for (route, status), count in http.responses.items():
            responses.add_metric([route, str(status)], count)
        yield responses
        refusals = CounterMetricFamily(
            "nodeweave_http_refusals", "HTTP answers of 400 and above, by why.", labels=["code"]
        )
        for code, count in http.refusals.items():
            refusals.add_metric([code], count)
        yield refusals
        evicted = http.connections_evicted
        yield self._gauge("http_connections", "Open connections.", http.connections)
        yield self._counter("http_connections_evicted", "Idle ones that made room.", evicted)
        yield self._gauge("http_body_bytes", "Bodies of requests under way.", http.body_bytes)

    def _by_dp(self) -> Iterator[Metric]:
        """A series for each DP rank, where there are several: how evenly they are loaded."""
        by_dp = self._engine.stats_by_dp
        if len(by_dp) < 2:
            return
        for name, field in (
            ("num_requests_running", "num_running"),
            ("num_requests_waiting", "num_waiting"),
            ("kv_cache_pages_free", "kv_pages_free"),
        ):
            family = GaugeMetricFamily(
                f"nodeweave_dp_{name}", f"{name} by DP rank.", labels=["model_name", "dp_rank"]
            )
            for dp_rank, stats in enumerate(by_dp):
                family.add_metric([self._model_name, str(dp_rank)], getattr(stats, field))
            yield family

    def _expert_loads(self) -> Iterator[Metric]:
        """A series for each expert of each layer, where the model has any."""
        loads = self._engine.expert_loads
        if loads is None:
            return
        rows = CounterMetricFamily(
            "nodeweave_expert_tokens",
            "Tokens routed to each expert, over all ranks.",
            labels=["model_name", "layer", "expert"],
        )
        uneven = GaugeMetricFamily(
            "nodeweave_expert_rank_imbalance",
            "Rows of the rank that had most of them over the mean rank's, lately.",
            labels=["model_name", "layer"],
        )
        for layer, of_layer, ratio in zip(loads.layers, loads.rows, loads.imbalance, strict=True):
            for expert, count in enumerate(of_layer):
                rows.add_metric([self._model_name, str(layer), str(expert)], count)
            uneven.add_metric([self._model_name, str(layer)], ratio)
        yield rows
        yield uneven

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"nodeweave_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], float(value))
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"nodeweave_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _labelled(self, name: str, text: str, counts: Counter[str]) -> Metric:
        labels = ["model_name", "finished_reason"]
        family = CounterMetricFamily(f"nodeweave_{name}", text, labels=labels)
        for reason, count in counts.items():
            family.add_metric([self._model_name, reason], count)
        return family

    def _histogram(self, name: str, buckets: Buckets) -> Metric:
        family = HistogramMetricFamily(f"nodeweave_{name}", "In seconds.", labels=["model_name"])
        family.add_metric([self._model_name], list(buckets.cumulative()), buckets.total)
        return family
