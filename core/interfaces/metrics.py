"""The metrics of a server as plain data, and the interface of metrics exporters.

Knows nothing of the systems that get the metrics. Counts start at 0 with the server and only grow.
The bounds of a histogram never change.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import msgspec


class Point(msgspec.Struct, frozen=True):
    """The value of a counter or gauge. `labels` are the values for the family's `label_names`."""

    labels: tuple[str, ...]
    value: float


class Histogram(msgspec.Struct, frozen=True):
    """Counts of values. `counts[i]` has those above `bounds[i - 1]` and at most `bounds[i]`.

    `counts` has one entry more than `bounds`, for values above all bounds. `total` is the sum of
    all values."""

    labels: tuple[str, ...]
    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class MetricFamily(msgspec.Struct, frozen=True):
    """All series of one name. Names of counters have no `_total` at the end. Times are seconds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    label_names: tuple[str, ...]
    points: Sequence[Point] = ()
    histograms: Sequence[Histogram] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExporterContext:
    """What an exporter is built from, besides its options."""

    model_name: str


@runtime_checkable
class ScrapeExporter(Protocol):
    """An exporter that is read (pull): the answer of `GET path` is what it renders.

    The route needs the API key, like other routes. It is the same for every frontend.
    """

    path: str  # "/metrics"
    content_type: str

    def render(self, families: Sequence[MetricFamily]) -> bytes:
        """Return the body of the answer. Runs in the exporter's own thread.

        An exception is logged, and the answer is 500. If it takes longer than 10 s, the answer is
        503."""
        ...


@runtime_checkable
class PushExporter(Protocol):
    """An exporter that sends (push): `push` is called every `interval_s` seconds.

    An exporter that also has `path`, `content_type` and `render` is both.
    """

    interval_s: float

    def push(self, families: Sequence[MetricFamily]) -> None:
        """Runs in a thread of the exporter's own, so that it may block, and not again before it
        returned. What it raises is logged once, until it has succeeded again."""
        ...


class RequestMeter(Protocol):
    """Measures one request of a client, which may have several answers.

    Frontends release it; the engine calls the rest.
    """

    @property
    def first_token_s(self) -> float | None:
        """From the request's begin to the first token of its first answer."""
        ...

    def release(self) -> None:
        """Whoever began it is done with it. It ends once its answers have ended as well."""
        ...

    def hold(self) -> None:
        """An answer begins."""
        ...

    def first_token(self, now_s: float) -> None:
        """Of an answer; `now_s` by time.perf_counter()."""
        ...

    def finish(self, reason: str) -> None:
        """An answer has ended, for a reason of few: it labels a metric."""
        ...


class FrontendMetrics(Protocol):
    """What a frontend may count. Answers are counted without it, where the engine hands them out:
    tokens, times to first, next and last token, and how they ended."""

    def begin(self) -> RequestMeter:
        """To be given to `Engine.generate` with each of several answers that are one request. Its
        times count from now."""
        ...

    def ignore(self, names: Iterable[str]) -> None:
        """Count fields of a request that had no effect."""
        ...
