"""Counts and histograms of one server, filled where answers are handed out.

Knows nothing of requests' contents, nor of where the numbers go. A token costs a bisection and
three additions: a library's own histogram costs ten times that.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

from core.interfaces.metrics import Histogram

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
# What the event loop may do in one piece is bounded by 20 ms.
BLOCKED_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
MAX_FIELD_NAMES, MAX_FIELD_CHARACTERS = 64, 64
OTHER_FIELDS = "(other)"


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

    def histogram(self, *labels: str) -> Histogram:
        """What it holds now."""
        return Histogram(labels, self.bounds, tuple(self.counts), self.total)


class Counts:
    """Implements core.interfaces.metrics.FrontendMetrics. One thread."""

    def __init__(self) -> None:
        self.first_token_s = Buckets(FIRST_TOKEN_BOUNDS_S)
        self.next_token_s = Buckets(NEXT_TOKEN_BOUNDS_S)
        self.request_s = Buckets(REQUEST_BOUNDS_S)
        self.loop_blocked_s = Buckets(BLOCKED_BOUNDS_S)
        self.finished: Counter[str] = Counter()  # answers by finish reason, "abort" among them
        self.ignored_fields: Counter[str] = Counter()  # by name, of a bounded number of names

    def begin(self) -> "Meter":
        return Meter(self)

    def ignore(self, names: Iterable[str]) -> None:
        """Clients choose the names, so that only the first of them have a series of their own."""
        for name in names:
            clean = name[:MAX_FIELD_CHARACTERS]
            full = len(self.ignored_fields) >= MAX_FIELD_NAMES
            known = clean in self.ignored_fields or not full
            self.ignored_fields[clean if known else OTHER_FIELDS] += 1


class Meter:
    """Implements core.interfaces.metrics.RequestMeter.

    It ends, and the request is counted, once it is released and each answer has ended. A request
    that was refused before it had any answer is not counted.
    """

    __slots__ = ("_begin_s", "_counts", "_has_answers", "_holders", "first_token_s")

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._holders = 1  # whoever began it, and its answers under way
        self._has_answers = False
        self.first_token_s: float | None = None
        self._begin_s = time.perf_counter()

    def hold(self) -> None:
        """An answer begins."""
        self._has_answers = True
        self._holders += 1

    def first_token(self, now_s: float) -> None:
        """`now_s` by time.perf_counter()."""
        seconds = now_s - self._begin_s
        self._counts.first_token_s.observe(seconds)
        if self.first_token_s is None:
            self.first_token_s = seconds

    def finish(self, reason: str) -> None:
        """An answer has ended, for this reason."""
        self._counts.finished[reason] += 1
        self.release()

    def release(self) -> None:
        self._holders -= 1
        if self._holders == 0 and self._has_answers:
            self._counts.request_s.observe(time.perf_counter() - self._begin_s)
