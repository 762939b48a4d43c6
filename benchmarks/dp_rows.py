"""Steps in which DP ranks have unequal rows: what `benchmarks.gpu_ranks --unequal` measures.

    python -m benchmarks.gpu_ranks MODEL 1,32,128 --parallel tp2_ep2_dp2 --unequal --prefill 8x1024

"unequal_decode": a decode step in which the first DP rank has a batch and every other one as many
rows, half of them, one, or none. All ranks run every step, at the pace of the busiest: it should
take no longer than with equal rows. "others_prefill": every other rank decodes a batch while
prompts come to the first one; the gaps are those between the tokens of who decodes. Every leader
calls `measure` at the same time, and all take equally many turns; the first one's times count.
"""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import gpu_cells as cells

NEW_TOKENS = 96  # of each request that decodes
FIRST_TURN, LAST_TURN = (
    16,
    80,
)  # of decode cells, that count: all prompts are computed, nobody ended
PROMPTS_AT = 24  # turn in which prompts come beside decodes
ISL = 32  # tokens of a prompt whose answer is measured

Requests = list[tuple[int, int]]  # prompt tokens, new tokens


def measure(
    leader: Any, dp_rank: int, num_dp: int, vocab_size: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each cell, as DP rank 0 saw it."""
    prefill = cells.prefill_of(arguments)

    def decodes(rows: int) -> Requests:
        return [(ISL, NEW_TOKENS)] * rows

    turns(leader, {0: decodes(4)}, vocab_size)
    for batch in cells.batches_of(arguments):
        for others in sorted({batch, batch // 2, min(batch, 1), 0}, reverse=True):
            times = turns(leader, {0: decodes(others if dp_rank else batch)}, vocab_size)
            step_s = statistics.median(seconds for seconds, _ in times[FIRST_TURN:LAST_TURN])
            rows = [batch, *[others] * (num_dp - 1)]
            yield {"cell": "unequal_decode", "rows": rows, "step_ms": round(step_s * 1e3, 3)}
        if prefill is None:
            continue
        prompts: Requests = [(prefill[1], 1)] * prefill[0]
        sent = {0: decodes(batch)} if dp_rank else {PROMPTS_AT: prompts}
        times = turns(leader, sent, vocab_size)
        if dp_rank == 0:
            row = {"cell": "others_prefill", "decodes": batch, "prompts": arguments.prefill}
            yield row | gaps(times, prefill[0])


def gaps(times: list[tuple[float, int]], num_prompts: int) -> dict[str, Any]:
    """Of the turns from the one in which prompts came to the one with the last of their tokens."""
    told = list(itertools.accumulate(num_tokens for _, num_tokens in times))
    last = told.index(num_prompts)
    before = [seconds for seconds, _ in times[FIRST_TURN:PROMPTS_AT]]
    beside = [seconds for seconds, _ in times[PROMPTS_AT : last + 1]]
    return {
        "decode_ms": round(statistics.median(before) * 1e3, 3),
        "gap_ms_p50": round(statistics.median(beside) * 1e3, 3),
        "gap_ms_max": round(max(beside) * 1e3, 3),
        "steps": len(beside),
        "prompts_ms": round(sum(beside) * 1e3, 3),
    }


def turns(leader: Any, sent: dict[int, Requests], vocab_size: int) -> list[tuple[float, int]]:
    """Turn until no DP rank has work; requests are sent before the turns that they stand for.
    Seconds and tokens of each turn; a turn ends when the step before it has."""
    from core.interfaces.messages import Generate, SamplingParams

    chosen = random.Random(repr(sent))
    found: list[tuple[float, int]] = []
    while not (found and leader.is_parked):
        for index, (length, new_tokens) in enumerate(sent.get(len(found), [])):
            params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
            prompt = [chosen.randrange(10, vocab_size) for _ in range(length)]
            leader.send(Generate(f"{len(found)}-{index}", prompt, params))
        begin = time.perf_counter()
        outputs = leader.step()
        seconds = time.perf_counter() - begin
        found.append((seconds, sum(len(output.token_ids) for output in outputs)))
    return found
