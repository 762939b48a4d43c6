"""Where the time of a step goes: kernels by total time, and the gaps between them.

`summarise` is arithmetic on the device's events of a Chrome trace; `traced` makes one with
torch.profiler. Kernels that overlap (programmatic dependent launch) are counted once in `busy`.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
NUM_KERNELS = 10
NAME_LENGTH = 90


def summarise(events: Iterable[Mapping[str, Any]], num_steps: int) -> dict[str, Any]:
    """Microseconds of one step of `num_steps`: of the most expensive kernels, of all together, and
    of the gaps in which none ran."""
    found = [event for event in events if event.get("cat") in DEVICE_CATEGORIES]
    found.sort(key=lambda event: event["ts"])
    if not found:
        return {"kernels_a_step": 0, "busy_us": 0.0, "gap_us": 0.0, "gaps": 0, "top": []}
    by_name: dict[str, list[float]] = defaultdict(list)
    busy = gap = 0.0
    gaps = 0
    end = found[0]["ts"]
    for event in found:
        start, stop = event["ts"], event["ts"] + event["dur"]
        by_name[event["name"]].append(event["dur"])
        if start > end:
            gap += start - end
            gaps += 1
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    return {
        "kernels_a_step": round(len(found) / num_steps, 1),
        "busy_us": round(busy / num_steps, 1),
        "gap_us": round(gap / num_steps, 1),
        "gaps": round(gaps / num_steps, 1),
        "top": [
            {
                "kernel": name[:NAME_LENGTH],
                "count": round(len(durations) / num_steps, 1),
                "us": round(sum(durations) / num_steps, 1),
                "mean_us": round(sum(durations) / len(durations), 2),
            }
            for name, durations in ranked[:NUM_KERNELS]
        ],
    }


def between_steps(events: Iterable[Mapping[str, Any]]) -> list[float]:
    """Microseconds that the device idled between each two replayed steps. A step is what one
    launch of a graph started; small graphs (less than half the largest) count as between."""
    found = [event for event in events if event.get("cat") in DEVICE_CATEGORIES]
    launches: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in found:
        launches[event.get("args", {}).get("correlation")].append(event)
    launches.pop(None, None)
    largest = max((len(group) for group in launches.values()), default=0)
    steps = [group for group in launches.values() if len(group) > max(1, largest // 2)]
    spans = sorted((min(e["ts"] for e in g), max(e["ts"] + e["dur"] for e in g)) for g in steps)
    found.sort(key=lambda event: event["ts"])
    idle = []
    for (_, end), (start, _) in pairwise(spans):
        free = 0.0
        for event in found:
            if end < event["ts"] <= start:
                free += event["ts"] - end
            if event["ts"] <= start:
                end = max(end, event["ts"] + event["dur"])
        idle.append(free)
    return idle


def traced(work: Callable[[], object]) -> list[dict[str, Any]]:
    """The Chrome-trace events of the device while `work` ran."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def table(summary: Mapping[str, Any]) -> str:
    """The same for a person."""
    lines = [
        f"  {summary['kernels_a_step']} kernels a step, busy {summary['busy_us']} us, "
        f"{summary['gaps']} gaps of {summary['gap_us']} us"
    ]
    lines += [
        f"  {row['us']:>9.1f} us {row['count']:>6.1f} x {row['mean_us']:>8.2f}  {row['kernel']}"
        for row in summary["top"]
    ]
    return "\n".join(lines)
