"""An event loop whose clock jumps: a test may wait a minute without waiting."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class ClockLoop(asyncio.SelectorEventLoop):
    """Time passes only when nothing is left to do, and then at once to the next timer."""

    _now = 0.0

    def pause(self, seconds: float) -> None:
        """Let time pass in which this process does not run."""
        self._now += seconds

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready:  # type: ignore[attr-defined]
            timers = [timer for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
            if timers:
                self._now = max(self._now, min(timer.when() for timer in timers))
        super()._run_once()  # type: ignore[misc]


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=ClockLoop) as runner:
        return runner.run(coroutine)
