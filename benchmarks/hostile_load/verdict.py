"""Whether a server held: what in a report is not as it should be."""

from itertools import pairwise
from typing import Any

from benchmarks.hostile_load.watch import median_near

WORST_GAP_S = 2.0
EARLY_S, WINDOW_S = 180.0, 60.0  # medians over two minutes: bodies of many MiB come and go
# Beside what is allocated for good early on: arenas of the C library that a thread first needs.
MOST_GROWTH, MOST_GROWTH_MIB = 1.05, 16.0
# A leak goes on to the end; what fills up, or is needed once, does not.
PARTS = (0.0, 1 / 3, 2 / 3, 5 / 6, 1.0)  # of the time between "early" and the end
MOST_RISE_MIB_PER_MINUTE, MOST_RISE_PER_PART = 0.25, 0.001
LEAST_JUDGED_S = 20 * 60.0  # less tells nothing of so slow a leak
MOST_MORE_DESCRIPTORS = 8
FORKS = "text forks"

Samples = list[tuple[float, dict[str, tuple[float, int]]]]


def problems(row: dict[str, Any], samples: Samples) -> list[str]:
    """One line for each; none where all held."""
    found = []
    for who in ("honest", "honest_nodes"):
        found += [f"{who}: {line}" for line in stream_problems(row[who])]
    found += memory_problems(row, samples)
    found += answer_problems(row["metrics"])
    for who in ("end", "end_nodes"):
        if row[who]["status"] != 0:
            found.append(f"{who}: status {row[who]['status']}")
    if row["tracebacks"]:
        found.append(f"{row['tracebacks']} tracebacks in the servers' output")
    return found


def stream_problems(honest: dict[str, Any]) -> list[str]:
    streams, gaps = honest["streams"], honest["attack"]["gaps"]
    found = [
        f"{streams[kind]} streams {kind}"
        for kind in ("lost", "wrong", "refused")
        if streams.get(kind, 0)
    ]
    if streams.get("finished", 0) != streams.get("begun", 0) - sum(
        streams.get(kind, 0) for kind in ("lost", "refused")
    ):
        found.append("not every stream finished")
    if not streams.get("finished"):
        found.append("no stream finished")
    if gaps.get("most", 0) >= WORST_GAP_S:
        found.append(f"a gap of {gaps['most']} s")
    return found


def memory_problems(row: dict[str, Any], samples: Samples) -> list[str]:
    """What grew between minute 3 (or a third of a shorter run) and the end: by much, or again and
    again (`goes_on`)."""
    attack_s = row["minutes"] * 60
    early_s = min(EARLY_S, attack_s / 3)
    last_s = samples[-1][0]
    found = []
    for role in sorted({role for _, kinds in samples for role in kinds}):
        if role.endswith(FORKS):
            continue  # each is as large as its last job, and has a limit of its own
        early = median_near(samples, role, early_s - WINDOW_S, early_s + WINDOW_S, lambda x: x[0])
        late = median_near(samples, role, attack_s - 2 * WINDOW_S, attack_s, lambda x: x[0])
        if early is None or late is None:
            found.append(f"{role} was not there all the time")
        elif late > early * MOST_GROWTH + MOST_GROWTH_MIB:
            found.append(f"{role} grew from {early:.0f} to {late:.0f} MiB")
        elif goes_on(lows := lows_of(samples, role, early_s, attack_s), attack_s - early_s):
            found.append(f"{role} grows on: " + ", ".join(f"{low:.1f}" for low in lows) + " MiB")
        early_fds = samples[0][1].get(role, (0, 0))[1]
        late_fds = samples[-1][1].get(role, (0, 0))[1]
        if late_fds > early_fds + MOST_MORE_DESCRIPTORS and last_s > attack_s:
            found.append(f"{role} had {early_fds} descriptors and has {late_fds}")
    return found


def lows_of(samples: Samples, role: str, begin_s: float, end_s: float) -> list[float]:
    """The least MiB in each part of a time (PARTS): what is held for good, on top of which bodies
    and answers of many MiB come and go. Empty where a part has no sample."""
    lows = []
    for first, last in pairwise(begin_s + part * (end_s - begin_s) for part in PARTS):
        sizes = [row[role][0] for when_s, row in samples if first <= when_s < last and role in row]
        if not sizes:
            return []
        lows.append(min(sizes))
    return lows


def goes_on(lows: list[float], seconds: float) -> bool:
    """Whether memory rose from each part of a time of so many seconds to the next, as a leak does.

    A cache that fills up, or an arena that a thread first needs, rises now and then, and is level
    at last; a leak rises always. Of a run of 30 minutes 27 count: a leak of 0.4 MiB a minute makes
    rises of 3.6, 3.6 and 1.8 MiB between the parts' beginnings there, and 2.3, 2.3 and 1.1 are
    allowed, though `MOST_GROWTH_MIB` alone would let all its 11 MiB pass. Of a process of many GiB
    a thousandth is allowed for each.
    """
    if not lows or seconds < LEAST_JUDGED_S:
        return False
    rises = [later - before for before, later in pairwise(lows)]
    minutes = [(later - before) * seconds / 60 for before, later in pairwise(PARTS[:-1])]
    return all(
        rise > max(MOST_RISE_MIB_PER_MINUTE * length, MOST_RISE_PER_PART * lows[0])
        for rise, length in zip(rises, minutes, strict=True)
    )


def answer_problems(metrics: dict[str, float]) -> list[str]:
    """Answers of 500, requests and pages that stayed."""
    found = []
    for name, value in metrics.items():
        if name.startswith("http_responses_total") and 'status="500"' in name:
            found.append(f"{value:.0f} answers of 500: {name}")
        if name.startswith("num_requests") and "{" in name and value:
            kind = name.partition("{")[0]
            if kind in ("num_requests_running", "num_requests_waiting", "num_requests_live"):
                found.append(f"{kind} is {value:.0f} at the end")
    pages = {
        name.partition("{")[0]: value
        for name, value in metrics.items()
        if name.startswith("kv_cache_pages")
    }
    if pages["kv_cache_pages_free"] + pages["kv_cache_pages_cached"] != pages["kv_cache_pages"]:
        found.append(f"pages are missing: {pages}")
    return found
