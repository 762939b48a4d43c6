"""Runs many steps of changing batches, and compares the memory held early and late.

    python -m benchmarks.soak MODEL_DIR [--steps 10000] [--layers 4] [--uniform-routing]

Made-up weights. Requests of random lengths come and go, so that prompts, decode steps of every size
and captured steps take turns. Memory is read after a tenth of the steps, when every size has been
seen, and after the last one: bytes that torch holds and has reserved, bytes of the device in use,
and resident bytes of the process. Prints one JSON line; ends with status 1 where tensors grew by
more than 0.01%, or one of the others by more than 1%.
"""

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_engine import configuration, parse_alone, shape_of
from core.engine.local.in_process import build_in_process, offline_in_process
from core.engine.local.offline import OfflineEngine
from core.interfaces.messages import SamplingParams

LONGEST_PROMPT, LONGEST_ANSWER = 600, 200
MOST_GROWTH, MOST_GROWTH_OF_TENSORS = 1.01, 1.0001


def memory(device: torch.device) -> dict[str, int]:
    """Bytes held now."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    held = {"resident": int(resident.split()[1]) * 1024}
    if device.type == "cuda":
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        held["allocated"] = torch.cuda.memory_allocated()
        held["reserved"] = torch.cuda.memory_reserved()
        held["device"] = total - free
    return held


class Traffic:
    """Keeps a changing number of requests of random lengths in an engine."""

    def __init__(self, engine: OfflineEngine, batch: int, vocab_size: int) -> None:
        self._engine, self._batch, self._vocab_size = engine, batch, vocab_size
        self._chosen = random.Random(0)
        self._running: set[str] = set()
        self.answered = 0

    def step(self) -> None:
        """One step of the engine, with new requests now and then."""
        wanted = self._chosen.randint(1, self._batch)
        while len(self._running) < wanted:
            length = self._chosen.randint(1, LONGEST_PROMPT)
            prompt = [self._chosen.randrange(self._vocab_size) for _ in range(length)]
            params = SamplingParams(
                max_tokens=self._chosen.randint(1, LONGEST_ANSWER),
                temperature=self._chosen.choice((0.0, 0.0, 0.8)),
                ignore_eos=True,
            )
            self._running.add(self._engine.submit(prompt, params))
        for output in self._engine.step():
            if output.finish_reason is not None:
                self._running.discard(output.request_id)
                self.answered += 1


def compared(early: dict[str, int], late: dict[str, int]) -> dict[str, Any]:
    """How much each grew, and whether none grew more than allowed."""
    grown = {key: round(late[key] / early[key], 5) for key in late}
    torch_holds_no_more = grown.get("allocated", 1.0) <= MOST_GROWTH_OF_TENSORS
    return {
        "grown": grown,
        "bounded": torch_holds_no_more and max(grown.values()) <= MOST_GROWTH,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes early and late, and how they compare."""
    shape, name = shape_of(Path(arguments.model_dir))
    shape["num_hidden_layers"] = arguments.layers
    lone = build_in_process(configuration(arguments, shape, name))
    traffic = Traffic(offline_in_process(lone), arguments.batch, shape["vocab_size"])
    begin = time.perf_counter()
    early: dict[str, int] = {}
    for step in range(arguments.steps):
        traffic.step()
        if step == arguments.steps // 10:
            early = memory(lone.device)
    late = memory(lone.device)
    return {
        "model": name,
        "layers": arguments.layers,
        "steps": arguments.steps,
        "answered": traffic.answered,
        "seconds": round(time.perf_counter() - begin, 1),
        "early_bytes": early,
        "late_bytes": late,
    } | compared(early, late)


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, and the cells that `configuration` plans for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", help="a folder with config.json")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32, help="most requests at once")
    arguments = parse_alone(parser, words)
    arguments.isl, arguments.osl = LONGEST_PROMPT, LONGEST_ANSWER
    return arguments


def main() -> None:
    row = measure(parsed())
    print(json.dumps(row), flush=True)
    sys.exit(0 if row["bounded"] else 1)


if __name__ == "__main__":
    main()
