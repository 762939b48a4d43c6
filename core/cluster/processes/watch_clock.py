"""A clock that runs only while whoever watches others runs too.

A process that was stopped, or a machine that was paused as a whole (`docker pause`, a suspended
virtual machine), wakes and finds that nobody was heard for minutes. That says nothing of the
others: they stood still as well, or spoke and were not read yet. Here such a gap counts as little.
"""

import time


class WatchClock:
    """Used from one thread, which calls `tick` each time it comes to look."""

    def __init__(self, *, longest_gap_s: float) -> None:
        """`longest_gap_s`: of two looks in a row, as far as it counts. Looks are closer together
        than that where nothing keeps the watcher from running."""
        self._longest_gap_s = longest_gap_s
        self._last_s = time.monotonic()
        self.now_s = 0.0  # of this clock

    def tick(self) -> float:
        """Take in the time since the last call; returns how much of it (s) did not count."""
        now = time.monotonic()
        passed_s, self._last_s = now - self._last_s, now
        counted_s = min(passed_s, self._longest_gap_s)
        self.now_s += counted_s
        return passed_s - counted_s
