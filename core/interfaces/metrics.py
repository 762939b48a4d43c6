"""What a server counts, as plain data, and what an exporter of it fills.

Knows nothing of any system that metrics are sent to. Counts grow from the start of the server; a
histogram's bounds never change.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import msgspec


class Point(msgspec.Struct, frozen=True):
    """A counter's or a gauge's value; `labels` are values of the family's `label_names`."""

    labels: tuple[str, ...]
    value: float


class Histogram(msgspec.Struct, frozen=True):
    """How many values were at most `bounds[i]` and above the bound before it; `counts` has one
    entry more, for those above all bounds. `total` is the sum of all values."""

    labels: tuple[str, ...]
    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class MetricFamily(msgspec.Struct, frozen=True):
    """All series of one name. Counters have no `_total` at the end of it, times are in seconds."""

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
    """An exporter that is asked: `GET path` is answered with what it renders.

    The route wants the API key as every other does, and is the same for every frontend.
    """

    path: str  # "/metrics"
    content_type: str

    def render(self, families: Sequence[MetricFamily]) -> bytes:
        """Runs in a thread of the exporter's own. What it raises is logged and answered with 500,
        and what takes longer than 10 s with 503."""
        ...


@runtime_checkable
class PushExporter(Protocol):
    """An exporter that sends: `push` is called every `interval_s` seconds.

    One that has `path`, `content_type` and `render` too is both.
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
