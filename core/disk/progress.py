"""How far a long task is, told at most ten times a second."""

import time
from collections.abc import Callable

OnProgress = Callable[[str, int, int, str], None]  # task, done, total (0: unknown), unit

MIN_INTERVAL_S = 0.1


class ByteMeter:
    """Counts the bytes of one task and passes them on now and then."""

    def __init__(self, task: str, total_bytes: int, on_progress: OnProgress) -> None:
        self._task, self._total_bytes, self._on_progress = task, total_bytes, on_progress
        self._done_bytes = 0
        self._last_report_s = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """So many more are done."""
        self._done_bytes += num_bytes
        now = time.monotonic()
        if now - self._last_report_s >= MIN_INTERVAL_S:
            self._last_report_s = now
            self._on_progress(self._task, self._done_bytes, self._total_bytes, "B")

    def finish(self) -> None:
        """All is done: the last report has done equal to total."""
        total_bytes = self._total_bytes or self._done_bytes
        self._on_progress(self._task, total_bytes, total_bytes, "B")
