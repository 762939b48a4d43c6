"""What a client saw of a load, as plain values, and how two servers compare.

Pure. Milliseconds and seconds are of the client's clock. Of a ratio above 1 ours is ahead, whatever
the figure.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.client import Answer, Outcome

Row = dict[str, Any]
PERCENTILES = (50, 90, 99)
# The figures that servers are compared by; of the first ones more is better.
HIGHER_IS_BETTER = ("out_tok_s", "goodput_req_s", "user_tok_s.p50", "user_tok_s.p99")
LOWER_IS_BETTER = tuple(
    f"{figure}.p{percentile}"
    for figure in ("ttft_ms", "itl_ms", "tpot_ms")
    for percentile in PERCENTILES
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep to count as well served."""

    ttft_ms: float
    tpot_ms: float


def percentile(sorted_values: Sequence[float], percent: float) -> float:
    """Linear between neighbours, as numpy's."""
    place = (len(sorted_values) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(sorted_values) - 1)
    return sorted_values[low] + (sorted_values[high] - sorted_values[low]) * (place - low)


def spread(values: Iterable[float], digits: int = 2) -> Row:
    """Mean, percentiles and the largest; empty of nothing."""
    ordered = sorted(values)
    if not ordered:
        return {}
    row: Row = {"mean": statistics.fmean(ordered)}
    row |= {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
    row["max"] = ordered[-1]
    return {name: round(value, digits) for name, value in row.items()}


def ttft_ms(answer: Answer) -> float:
    """From when the request was due, so that a late client is no excuse."""
    return (answer.event_times[0] - answer.due) * 1e3


def tpot_ms(answer: Answer) -> float | None:
    """Of each token after the first; None where there is none."""
    if answer.num_tokens < 2:
        return None
    return (answer.event_times[-1] - answer.event_times[0]) / (answer.num_tokens - 1) * 1e3


def gaps_ms(answer: Answer) -> list[float]:
    """Between events, of which a server may put several tokens into one."""
    times = answer.event_times
    return [(late - early) * 1e3 for early, late in itertools.pairwise(times)]


def is_good(answer: Answer, limits: Limits) -> bool:
    each = tpot_ms(answer)
    return ttft_ms(answer) <= limits.ttft_ms and (each is None or each <= limits.tpot_ms)


def summarise(outcome: Outcome, limits: Limits, num_gpus: int = 1) -> Row:
    """The figures of one load. `wall_s` ends with the last byte of an answer."""
    whole = [answer for answer in outcome.answers if answer.is_whole]
    broken = [answer for answer in outcome.answers if not answer.is_whole]
    wall_s = max(outcome.end - outcome.begin, 1e-9)
    tokens = sum(answer.num_tokens for answer in whole)
    good = sum(is_good(answer, limits) for answer in whole)
    per_token = sorted(
        (answer.event_times[-1] - answer.due) / answer.num_tokens for answer in whole
    )
    num_events = sum(len(answer.event_times) for answer in whole)
    row: Row = {
        "requests": len(outcome.answers),
        "whole": len(whole),
        "was_cut": outcome.was_cut,
        "wall_s": round(wall_s, 3),
        "out_tok_s": round(tokens / wall_s, 1),
        "tok_s_gpu": round(tokens / wall_s / num_gpus, 1),
        "req_s": round(len(whole) / wall_s, 3),
        "goodput_req_s": round(good / wall_s, 3),
        "good_share": round(good / len(outcome.answers), 4) if outcome.answers else 0.0,
        "limits_ms": {"ttft": limits.ttft_ms, "tpot": limits.tpot_ms},
        "ttft_ms": spread(map(ttft_ms, whole)),
        "itl_ms": spread(gap for answer in whole for gap in gaps_ms(answer)),
        "tpot_ms": spread(each for each in map(tpot_ms, whole) if each is not None),
        "e2e_ms": spread((answer.event_times[-1] - answer.due) * 1e3 for answer in whole),
        # Tokens a second of one user's request, its wait included, that half, 90% and 99% exceed.
        "user_tok_s": {
            f"p{percent}": round(1 / percentile(per_token, percent), 2)
            for percent in PERCENTILES
            if per_token
        },
        "tokens_per_event": round(tokens / num_events, 3) if num_events else None,
        "client": {
            "late_ms": spread((answer.begun - answer.due) * 1e3 for answer in outcome.answers),
            "loop_lag_ms": spread(lag * 1e3 for lag in outcome.loop_lags),
            "cpu_share": round(outcome.cpu_s / wall_s, 3),
        },
    }
    cached = [answer.num_cached for answer in whole if answer.num_cached is not None]
    if cached:
        row["cached_tokens"] = sum(cached)
    if broken:
        row["errors"] = sorted({answer.error or "too few tokens" for answer in broken})[:3]
    return row


def figure(row: Mapping[str, Any], name: str) -> float | None:
    """`itl_ms.p99` of a summary; None where it has none."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def ratios(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, float]:
    """Of every figure that both have, how far ours is ahead, and the geometric mean of them all."""
    found: dict[str, float] = {}
    for name in (*HIGHER_IS_BETTER, *LOWER_IS_BETTER):
        mine, theirs = figure(ours, name), figure(peer, name)
        if not mine or not theirs:
            continue
        found[name] = round(mine / theirs if name in HIGHER_IS_BETTER else theirs / mine, 4)
    if found:
        found["mean"] = round(statistics.geometric_mean(found.values()), 4)
    return found


COLUMNS = (
    ("tok/s", "out_tok_s", "{:.0f}"),
    ("good req/s", "goodput_req_s", "{:.2f}"),
    *((f"TTFT p{p}", f"ttft_ms.p{p}", "{:.0f}") for p in PERCENTILES),
    *((f"ITL p{p}", f"itl_ms.p{p}", "{:.1f}") for p in PERCENTILES),
    *((f"TPOT p{p}", f"tpot_ms.p{p}", "{:.1f}") for p in (50, 99)),
    ("user tok/s", "user_tok_s.p50", "{:.1f}"),
)


def table(rows: Sequence[Row]) -> str:
    """Summaries and ratios as lines of a Markdown table; those of one load stand together."""
    lines = [
        "| load | server | " + " | ".join(title for title, _, _ in COLUMNS) + " | mean |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for load in dict.fromkeys(row["load"] for row in rows if "load" in row):
        for row in rows:
            if row.get("load") != load:
                continue
            is_ratio = "ratios" in row
            values = row["ratios"] if is_ratio else row
            cells = []
            for _, name, form in COLUMNS:
                value = values.get(name) if is_ratio else figure(values, name)
                cells.append(
                    "" if value is None else ("{:.2f}" if is_ratio else form).format(value)
                )
            name = f"{row['server']} / {row['peer']}" if is_ratio else row["server"]
            cut = " (cut)" if row.get("was_cut") else ""
            mean = f"{values['mean']:.3f}" if is_ratio and "mean" in values else ""
            lines.append(f"| {load}{cut} | {name} | " + " | ".join(cells) + f" | {mean} |")
    return "\n".join(lines)
