"""How long the event loop was kept from its other work, for metrics.

Knows nothing of what kept it. A timer that is due every 10 ms comes late by as long as something
else ran. On a busy machine it also comes late because the process did not run at all, so lateness
is counted as what the loop's thread computed meanwhile: that is the same whatever else runs.
"""

import asyncio
import time

from core.serve.counts import Buckets

INTERVAL_S = 0.01


class LoopWatch:
    """Observes into `blocked_s` from `start` on, in the event loop that calls it."""

    def __init__(self, blocked_s: Buckets) -> None:
        self._blocked_s = blocked_s

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._schedule()

    def _schedule(self) -> None:
        self._cpu_s = time.thread_time()
        self._due = self._loop.time() + INTERVAL_S
        self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        late_s = self._loop.time() - self._due
        computed_s = time.thread_time() - self._cpu_s
        self._blocked_s.observe(max(min(late_s, computed_s), 0.0))
        self._schedule()
