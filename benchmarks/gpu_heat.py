"""How long a GPU was too hot for its clocks, by its driver's counters.

A hot device may compute a third as fast, and says so nowhere else. Imports nothing of Nodeweave and
no engine, so that a peer's Python can run it too.
"""

import os
import re
import subprocess
import time

MOST_OF_ITS_TIME = 0.05
_COUNTER = re.compile(r"^ *[SH]W Thermal Slowdown *: *(\d+) us *$", re.MULTILINE)


def counters_s() -> list[float]:
    """Seconds of slowdown by software and by hardware since the driver was loaded, of the first
    visible GPU; empty where nobody counts them."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "-q", "-d", "PERFORMANCE", "-i", device]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parsed(told.stdout)


def parsed(told: str) -> list[float]:
    """The counters in nvidia-smi's words."""
    return [int(microseconds) / 1e6 for microseconds in _COUNTER.findall(told)]


def hot_s(before: list[float], after: list[float]) -> float | None:
    """Seconds between two readings in which the device was slowed; None: nobody knows."""
    if not before or len(before) != len(after):
        return None
    return round(max(late - early for early, late in zip(before, after, strict=True)), 3)


class Watch:
    """What became of the device since the last look, or since this was made."""

    def __init__(self) -> None:
        self._before, self._begin = counters_s(), time.perf_counter()

    def look(self) -> tuple[float, float | None]:
        """(seconds, those of them in which it was slowed). Ends the process where it was too hot:
        what it did meanwhile is not to be told."""
        before, took_s = self._before, time.perf_counter() - self._begin
        self._before = counters_s()
        self._begin = time.perf_counter()
        hot = hot_s(before, self._before)
        if hot is not None and hot > MOST_OF_ITS_TIME * took_s:
            raise SystemExit(
                f"the GPU was too hot for its clocks in {hot:.1f} of {took_s:.1f} seconds "
                "(nvidia-smi -q -d PERFORMANCE counts them): what it did in them means nothing. "
                "Let it cool down, or take another"
            )
        return took_s, hot
