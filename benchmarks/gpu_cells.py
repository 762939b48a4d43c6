"""What engines are measured at: the cells of `benchmarks.gpu_engine`, and how a cell is timed.

Imports nothing of Nodeweave and no engine, so that a peer's Python can run it too. `generate` takes
prompts and a number of new tokens, and returns when all answers are whole. A cell is the better of
two: seconds to the first token of all prompts give the prefill rate, the seconds that more tokens
take beyond those the decode rate.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

if __package__:
    from benchmarks import gpu_heat
else:  # beside gpu_peer.py
    import gpu_heat

Generate = Callable[[list[list[int]], int], None]
MIXED_REQUESTS = 64
MIXED_SHORTEST, MIXED_LONGEST = 256, 16384
TTFT_TOKENS = 1024
MAX_ID = 100_000  # below the vocabulary of every model here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The cells of a run; the same for all engines."""
    parser.add_argument("model_dir", help="a folder with config.json")
    parser.add_argument("batches", help="comma-separated; - for none")
    parser.add_argument("isl", nargs="?", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("osl", nargs="?", type=int, default=128, help="tokens generated")
    parser.add_argument("--prefill", metavar="BATCHxTOKENS", help="prefill alone, e.g. 16x2048")
    parser.add_argument("--mixed", action="store_true", help="64 requests of 256 to 16k tokens")
    parser.add_argument("--ttft", action="store_true", help="first token of one 1,024-token prompt")
    parser.add_argument("--repeats", type=int, default=2, help="runs of a cell; the best counts")


def batches_of(arguments: argparse.Namespace) -> list[int]:
    """The decode cells' batch sizes."""
    text = arguments.batches
    return [] if text == "-" else [int(batch) for batch in text.split(",")]


def prefill_of(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """(prompts, tokens of each) of the prefill cell."""
    if arguments.prefill is None:
        return None
    batch, tokens = arguments.prefill.split("x")
    return int(batch), int(tokens)


def mixed_lengths() -> list[int]:
    """Prompt tokens of the mixed cell, the same in every run: spread evenly by their logarithm."""
    chosen = random.Random(4)
    spread = math.log(MIXED_LONGEST / MIXED_SHORTEST)
    steps = [index / (MIXED_REQUESTS - 1) for index in range(MIXED_REQUESTS)]
    lengths = [round(MIXED_SHORTEST * math.exp(spread * step)) for step in steps]
    chosen.shuffle(lengths)
    return lengths


def limits(arguments: argparse.Namespace) -> tuple[int, int]:
    """(longest sequence, most requests at once) that the cells need."""
    longest = max(4096, arguments.isl + arguments.osl + 1)
    requests = [*batches_of(arguments), 4]
    prefill = prefill_of(arguments)
    if prefill is not None:
        requests.append(prefill[0])
        longest = max(longest, prefill[1] + 2)
    if arguments.mixed:
        requests.append(MIXED_REQUESTS)
        longest = max(longest, MIXED_LONGEST + arguments.osl + 1)
    return longest, max(requests)


def measure(generate: Generate, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each cell, in the order in which they are worth having. Ends the process instead of
    giving that of a device which is too hot."""
    watch = gpu_heat.Watch()
    for row in _cells(generate, arguments):
        cell_s, hot_s = watch.look()
        yield row | {"cell_s": round(cell_s, 1), "hot_s": hot_s}


def _cells(generate: Generate, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    repeats = arguments.repeats

    def best(lengths: list[int], new_tokens: int) -> float:
        return min(seconds(generate, lengths, new_tokens) for _ in range(repeats))

    seconds(generate, [64] * 4, 8)
    for batch in batches_of(arguments):
        lengths = [arguments.isl] * batch
        seconds(generate, lengths, 2)
        yield {"cell": "decode", "batch": batch} | rates(best, lengths, arguments.osl)
    prefill = prefill_of(arguments)
    if prefill is not None:
        batch, tokens = prefill
        seconds(generate, [tokens] * batch, 1)
        rate = round(batch * tokens / best([tokens] * batch, 1))
        yield {"cell": "prefill", "batch": batch, "isl": tokens, "prefill_tok_s": rate}
    if arguments.ttft:
        times = sorted(seconds(generate, [TTFT_TOKENS], 1) for _ in range(7))
        yield {"cell": "ttft", "batch": 1, "isl": TTFT_TOKENS, "ttft_ms": round(times[3] * 1e3, 2)}
    if arguments.mixed:
        row = rates(best, mixed_lengths(), arguments.osl)
        yield {"cell": "mixed", "batch": MIXED_REQUESTS} | row


def rates(
    best: Callable[[list[int], int], float], lengths: list[int], new_tokens: int
) -> dict[str, Any]:
    """Prefill and decode rates of prompts of these lengths, and that of all tokens of a whole run:
    an engine may decode in the steps of prompts, so that what it does there is in neither alone."""
    prefill = best(lengths, 1)
    whole = best(lengths, new_tokens + 1)
    decode = whole - prefill
    return {
        "isl": round(sum(lengths) / len(lengths)),
        "osl": new_tokens,
        "prefill_tok_s": round(sum(lengths) / prefill),
        "decode_tok_s": round(len(lengths) * new_tokens / decode),
        "tpot_ms": round(decode / new_tokens * 1e3, 3),
        "run_tok_s": round((sum(lengths) + len(lengths) * (new_tokens + 1)) / whole),
    }


def seconds(generate: Generate, lengths: list[int], new_tokens: int) -> float:
    """Seconds that random prompts of these lengths take; the same prompts in every engine and
    every repeat of a cell."""
    chosen = random.Random(f"{len(lengths)} prompts of {sum(lengths)} tokens")
    prompts = [[chosen.randrange(10, MAX_ID) for _ in range(length)] for length in lengths]
    begin = time.perf_counter()
    generate(prompts, new_tokens)
    return time.perf_counter() - begin


def experts_of(shape: Mapping[str, Any]) -> tuple[int, int]:
    """(routed experts of a layer, those that a row chooses) of a config.json; 0 where none."""
    count = shape.get("num_experts") or shape.get("n_routed_experts") or 0
    return count, shape.get("num_experts_per_tok", 0) if count else 0


def distinct_experts(count: int, top_k: int, rows: int, *, replacement: bool = False) -> float:
    """Experts of a layer that `rows` rows are expected to choose between them, each `top_k` of
    `count` at random; with `replacement` a row may draw an expert twice."""
    if count == 0:
        return 0.0
    missed = (1 - 1 / count) ** top_k if replacement else 1 - top_k / count
    return float(count * (1 - missed**rows))


def put(row: dict[str, Any]) -> None:
    """One JSON line."""
    print(json.dumps(row), flush=True)
