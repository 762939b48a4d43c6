"""Milliseconds a sampling step takes, by kind of request, rows and vocabulary. Prints JSON.

    python -m benchmarks.sampler --device cpu --rows 1,16,256 --vocab 49152,128256

One line for each cell: the least and the median time of planning (host) and of the whole step
(plan and sample, and on a GPU until the device is done). Logits are random, with the spread of a
real model's; every row of a cell asks for the same, "mixed" cycles through all kinds.
"""

import argparse
import itertools
import json
import statistics
import time

import torch

from core.engine.sample.logprobs import sampled_logprobs
from core.engine.sample.sampler import Sampler
from core.interfaces.messages import SamplingParams, SlotInit

KINDS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "top_k_top_p": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "penalties": {
        "temperature": 0.0,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
    },
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}
CONTEXT = 1024  # tokens known of each request
PROMPT = 512


class Cell:
    """One batch of requests, ready to be sampled again and again."""

    def __init__(self, kind: str, num_rows: int, vocab_size: int, device: torch.device) -> None:
        fields = list(KINDS.values()) if kind == "mixed" else [KINDS[kind]]
        self.params = [
            SamplingParams(max_tokens=1, **fields[row % len(fields)]) for row in range(num_rows)
        ]
        self.device = device
        self.sampler = Sampler(
            max_slots=num_rows, vocab_size=vocab_size, device=device, eos_ids=[0]
        )
        self.sampler.init_slots(
            [SlotInit(row, [1], PROMPT, params, row) for row, params in enumerate(self.params)]
        )
        gen = torch.Generator().manual_seed(0)
        self.logits_RV = (torch.randn(num_rows, vocab_size, generator=gen) * 3).to(device)
        size = (num_rows, CONTEXT + 1)
        self.tokens_SL = torch.randint(vocab_size, size, generator=gen, dtype=torch.int32).to(
            device
        )
        self.slots, self.positions = list(range(num_rows)), [CONTEXT] * num_rows
        self.num_top = [params.logprobs for params in self.params]
        self.asks_logprobs = any(num is not None for num in self.num_top)

    def step(self) -> tuple[float, float]:
        """Seconds of planning, seconds of everything."""
        start = time.perf_counter()
        plan = self.sampler.prepare(self.slots, self.positions)
        planned = time.perf_counter()
        ids_R = self.sampler.sample(plan, self.logits_RV, self.tokens_SL)
        if self.asks_logprobs:
            sampled_logprobs(self.logits_RV, ids_R, self.num_top)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return planned - start, time.perf_counter() - start


def measure(cell: Cell, seconds: float) -> dict[str, float]:
    """Repeat for about `seconds`, at least five times, after three steps to warm up."""
    for _ in range(3):
        cell.step()
    times = [cell.step() for _ in range(5)]
    while sum(total for _, total in times) < seconds:
        times.append(cell.step())
    plans, totals = zip(*times, strict=True)
    return {
        "plan_ms_min": round(min(plans) * 1e3, 4),
        "step_ms_min": round(min(totals) * 1e3, 4),
        "step_ms_median": round(statistics.median(totals) * 1e3, 4),
        "repeats": len(times),
    }


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=integers, default=[1, 16, 256])
    parser.add_argument("--vocab", type=integers, default=[49152, 128256])
    parser.add_argument("--kinds", default=",".join([*KINDS, "mixed"]))
    parser.add_argument("--seconds", type=float, default=0.3, help="for each cell")
    options = parser.parse_args()
    device = torch.device(options.device)
    for vocab_size, num_rows in itertools.product(options.vocab, options.rows):
        for kind in options.kinds.split(","):
            with torch.inference_mode():
                result = measure(Cell(kind, num_rows, vocab_size, device), options.seconds)
            cell = {"kind": kind, "rows": num_rows, "vocab": vocab_size, "device": options.device}
            if device.type == "cuda":
                result["peak_allocated_mib"] = torch.cuda.max_memory_allocated() >> 20
                torch.cuda.reset_peak_memory_stats()
            print(json.dumps({"benchmark": "sampler", **cell, **result}), flush=True)


if __name__ == "__main__":
    main()
