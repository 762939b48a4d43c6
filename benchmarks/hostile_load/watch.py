"""Resident bytes and open descriptors of a server's processes over time."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import psutil

MIB = 1024 * 1024
INTERVAL_S = 5.0
FORKS = "text forks"  # processes that come and go: their largest, and descriptors of all


def processes(root: psutil.Process, prefix: str = "") -> dict[str, list[psutil.Process]]:
    """A server's processes by role; forks of the text process share one."""
    found: dict[str, list[psutil.Process]] = defaultdict(list)
    found[f"{prefix}parent"].append(root)
    children = sorted(root.children(recursive=True), key=lambda child: child.pid)
    for child in children:
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:
            continue  # it ended, or has no command line yet
        if "core.worker" in command:
            found[f"{prefix}worker"].append(child)
        elif "core.serve.process" in command:
            found[f"{prefix}frontend"].append(child)
        elif "core.serve.text.process" in command:
            role = FORKS if f"{prefix}text" in found else "text"
            found[f"{prefix}{role}"].append(child)
    return dict(found)


def sample(roots: dict[str, psutil.Process]) -> dict[str, tuple[float, int]]:
    """(MiB, descriptors) by role."""
    row = {}
    for prefix, root in roots.items():
        for role, members in processes(root, prefix).items():
            sizes, descriptors = [], 0
            for member in members:
                try:
                    sizes.append(member.memory_info().rss / MIB)
                    descriptors += member.num_fds()
                except psutil.Error:
                    continue
            if sizes:
                row[role] = (max(sizes), descriptors)
    return row


class Watch:
    """A thread that takes a sample every few seconds."""

    def __init__(self, roots: dict[str, psutil.Process]) -> None:
        self._roots = roots
        self._ends = threading.Event()
        self._begin_s = time.monotonic()
        self.samples: list[tuple[float, dict[str, tuple[float, int]]]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ends.wait(INTERVAL_S):
            self.samples.append((time.monotonic() - self._begin_s, sample(self._roots)))

    def close(self) -> None:
        self._ends.set()
        self._thread.join()


def median_near(
    samples: list[tuple[float, dict[str, tuple[float, int]]]],
    role: str,
    begin_s: float,
    end_s: float,
    pick: Callable[[tuple[float, int]], float],
) -> float | None:
    """Of what was sampled between two times."""
    values = sorted(
        pick(row[role]) for when_s, row in samples if begin_s <= when_s <= end_s and role in row
    )
    return values[len(values) // 2] if values else None


def over_time(
    samples: list[tuple[float, dict[str, tuple[float, int]]]], points: int = 10
) -> dict[str, Any]:
    """MiB and descriptors of each role at so many times, in order."""
    step = max(1, len(samples) // points)
    chosen = [*samples[::step], samples[-1]]
    roles = sorted({role for _, row in samples for role in row})
    return {
        "seconds": [round(when_s) for when_s, _ in chosen],
        "mib": {role: [round(row[role][0]) if role in row else None for _, row in chosen]
                for role in roles},
        "descriptors": {role: [row[role][1] if role in row else None for _, row in chosen]
                        for role in roles},
    }  # fmt: skip
