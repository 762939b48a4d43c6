"""What a server counts, gathered: its requests, its engine and its HTTP connections.

Knows nothing of who asks or where it goes. Names are those of vLLM with our own prefix.
"""

from collections.abc import Callable, Iterable, Iterator

from core.interfaces.frontend import Engine
from core.interfaces.http import HttpStats
from core.interfaces.metrics import MetricFamily, Point
from core.serve.counts import Buckets, Counts

PREFIX = "nodeweave_"
_MODEL = ("model_name",)


class ServerMetrics:
    """Read where the counts are filled, in one thread."""

    def __init__(
        self,
        model_name: str,
        engine: Engine,
        counts: Counts,
        http: HttpStats,
        dropped_log_lines: Callable[[], int],
    ) -> None:
        self._model_name = model_name
        self._engine = engine
        self._counts = counts
        self._http = http
        self._dropped_log_lines = dropped_log_lines

    def collect(self) -> list[MetricFamily]:
        """Every family as it is now; nothing in them changes later."""
        return list(self._families())

    def _families(self) -> Iterator[MetricFamily]:
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
        counts = self._counts
        yield _counter(
            "request_success",
            "Answers by reason of their end.",
            (*_MODEL, "finished_reason"),
            (((self._model_name, reason), count) for reason, count in counts.finished.items()),
        )
        yield from self._of_http()
        yield _counter(
            "ignored_fields",
            "Fields of requests without effect.",
            ("field",),
            (((name,), count) for name, count in counts.ignored_fields.items()),
        )
        yield self._histogram("time_to_first_token_seconds", counts.first_token_s)
        yield self._histogram("inter_token_latency_seconds", counts.next_token_s)
        yield self._histogram("e2e_request_latency_seconds", counts.request_s)
        yield self._histogram("event_loop_blocked_seconds", counts.loop_blocked_s)

    def _of_http(self) -> Iterator[MetricFamily]:
        http = self._http
        yield _counter(
            "http_responses",
            "HTTP answers.",
            ("route", "status"),
            (((route, str(status)), n) for (route, status), n in http.responses.items()),
        )
        yield _counter(
            "http_refusals",
            "HTTP answers of 400 and above, by why.",
            ("code",),
            (((code,), n) for code, n in http.refusals.items()),
        )
        evicted = http.connections_evicted
        yield self._gauge("http_connections", "Open connections.", http.connections)
        yield self._counter("http_connections_evicted", "Idle ones that made room.", evicted)
        yield self._gauge("http_body_bytes", "Bodies of requests under way.", http.body_bytes)

    def _by_dp(self) -> Iterator[MetricFamily]:
        """A series for each DP rank, where there are several: how evenly they are loaded."""
        by_dp = self._engine.stats_by_dp
        if len(by_dp) < 2:
            return
        for name, field in (
            ("num_requests_running", "num_running"),
            ("num_requests_waiting", "num_waiting"),
            ("kv_cache_pages_free", "kv_pages_free"),
        ):
            values = [getattr(stats, field) for stats in by_dp]
            yield _gauge(
                f"dp_{name}",
                f"{name} by DP rank.",
                (*_MODEL, "dp_rank"),
                (((self._model_name, str(rank)), value) for rank, value in enumerate(values)),
            )

    def _expert_loads(self) -> Iterator[MetricFamily]:
        """A series for each expert of each layer, where the model has any."""
        loads = self._engine.expert_loads
        if loads is None:
            return
        layers = [str(layer) for layer in loads.layers]
        yield _counter(
            "expert_tokens",
            "Tokens routed to each expert, over all ranks.",
            (*_MODEL, "layer", "expert"),
            (
                ((self._model_name, layer, str(expert)), count)
                for layer, of_layer in zip(layers, loads.rows, strict=True)
                for expert, count in enumerate(of_layer)
            ),
        )
        yield _gauge(
            "expert_rank_imbalance",
            "Rows of the rank that had most of them over the mean rank's, lately.",
            (*_MODEL, "layer"),
            (
                ((self._model_name, layer), ratio)
                for layer, ratio in zip(layers, loads.imbalance, strict=True)
            ),
        )

    def _gauge(self, name: str, text: str, value: float) -> MetricFamily:
        return _gauge(name, text, _MODEL, [((self._model_name,), float(value))])

    def _counter(self, name: str, text: str, value: float) -> MetricFamily:
        return _counter(name, text, _MODEL, [((self._model_name,), value)])

    def _histogram(self, name: str, buckets: Buckets) -> MetricFamily:
        histogram = buckets.histogram(self._model_name)
        return MetricFamily(PREFIX + name, "histogram", "In seconds.", _MODEL, (), (histogram,))


Series = Iterable[tuple[tuple[str, ...], float]]


def _counter(name: str, text: str, labels: tuple[str, ...], series: Series) -> MetricFamily:
    return MetricFamily(PREFIX + name, "counter", text, labels, [Point(*each) for each in series])


def _gauge(name: str, text: str, labels: tuple[str, ...], series: Series) -> MetricFamily:
    return MetricFamily(PREFIX + name, "gauge", text, labels, [Point(*each) for each in series])
