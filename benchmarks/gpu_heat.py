"""How long a GPU was too hot for its clocks, by its driver's counters.

A hot device may compute a third as fast, and says so nowhere else. Imports nothing of Nodeweave and
no engine, so that a peer's Python can run it too.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

MOST_OF_A_CELL = 0.05
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


def check(hot: float | None, cell_s: float) -> None:
    """Stop where what was measured is a device that is too hot."""
    if hot is not None and hot > MOST_OF_A_CELL * cell_s:
        raise SystemExit(
            f"the GPU was too hot for its clocks in {hot:.1f} of {cell_s:.1f} seconds "
            "(nvidia-smi -q -d PERFORMANCE counts them): what it did in them means nothing. Let it "
            "cool down, or take another"
        )


@contextmanager
def cool() -> Iterator[None]:
    """Around a measurement: stops where the device was too hot meanwhile."""
    before, begin = counters_s(), time.perf_counter()
    yield
    took_s = time.perf_counter() - begin
    check(hot_s(before, counters_s()), took_s)
