"""Decode and prefill rates on a CPU beside llama.cpp and vLLM, in one run.

    python -m benchmarks.decode_prefill --llama-python PYTHON --vllm-python PYTHON [key=value ...]

Ours is `+model=smollm2` (a GGUF file in Q4_1) with the defaults, and the keys that are given;
llama.cpp reads the same file, vLLM the same weights in bfloat16. Every engine is a process of its
own that stays, and they take turns: each repetition of a cell asks one after the other for the
whole batch's first tokens, and then for `--new-tokens` more, so that what else the machine does
falls on all. The least of a cell's repetitions counts, of the wall's seconds and, apart, of the
CPU's: beside other load compare those of one thread (`--threads 1`). Prompts are random tokens,
greedy, prefix cache off. Prints one JSON object; ratios are ours to the peer's rates, above 1 where
ours is faster.

An engine's program prints {"startup_s"}, then for each line [batch, prompt tokens, new tokens] of
its input {"seconds", "cpu_seconds"}, both over all its threads.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, float]
Rates = dict[str, float | None]  # None: load hid the difference that it comes from


def serve_ours(threads: int, max_tokens: int, words: list[str]) -> None:
    """Ours, as a program that takes turns."""
    os.cpu_count = lambda: threads  # what an engine in this process asks
    from core.engine.local.in_process import build_in_process, offline_in_process
    from core.interfaces.messages import SamplingParams
    from core.settings.compose import compose, parse_overrides

    start = time.perf_counter()
    defaults = [
        "+model=smollm2",
        "engine.device=cpu",
        "engine.disable_prefix_cache=true",
        "engine.kv_cache_tokens=16384",
        f"model.max_model_len={max_tokens}",
    ]
    lone = build_in_process(compose(parse_overrides([*defaults, *words])))
    engine, built = offline_in_process(lone), lone.engine.describe()

    def turn(batch: int, prompt_tokens: int, tokens: int) -> Row:
        prompts = [
            [random.randrange(10, 40000) for _ in range(prompt_tokens)] for _ in range(batch)
        ]
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        begin, begin_cpu = time.perf_counter(), time.process_time()
        answers = engine.generate(prompts, params)
        elapsed, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
        assert all(len(answer.token_ids) == tokens for answer in answers)
        return {"seconds": elapsed, "cpu_seconds": cpu}

    ready = {
        "startup_s": time.perf_counter() - start,
        "dtype": f"{built['dtype']}, {lone.resolved.dtype_reason or 'as asked for'}",
        "weight_bytes": built["weight_bytes"],
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        print(json.dumps(turn(*json.loads(line))), flush=True)


class Engine:
    """A program that takes turns."""

    def __init__(self, command: list[str], threads: int, log: Path) -> None:
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
        }
        self._log = log
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | environment,
            )
        self.ready: dict[str, Any] = self._answer()

    def turn(self, *sizes: int) -> Row:
        """Seconds of one batch: batch, prompt tokens, new tokens."""
        assert self._process.stdin is not None
        print(json.dumps(sizes), file=self._process.stdin, flush=True)
        return self._answer()

    def stop(self) -> None:
        """End the program."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # engines log there, too
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"an engine ended:\n{self._log.read_text()[-2000:]}")


def rates(
    engines: dict[str, Engine], sizes: tuple[int, int, int], repeats: int
) -> dict[str, Rates]:
    """Tokens a second of each engine in one cell, by the wall's and by the CPU's seconds."""
    batch, prompt_tokens, new_tokens = sizes
    first: dict[str, list[Row]] = {name: [] for name in engines}
    full: dict[str, list[Row]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            first[name].append(engine.turn(batch, prompt_tokens, 1))
            full[name].append(engine.turn(batch, prompt_tokens, new_tokens + 1))

    def row(name: str) -> Rates:
        found: Rates = {"batch": batch}
        for kind, ending in (("seconds", "tok_s"), ("cpu_seconds", "tok_cpu_s")):
            prefill = min(each[kind] for each in first[name])
            decode = min(each[kind] for each in full[name]) - prefill
            found[f"prefill_{ending}"] = round(batch * prompt_tokens / prefill, 1)
            rate = round(batch * new_tokens / decode, 1) if decode > 0 else None
            found[f"decode_{ending}"] = rate
        return found

    return {name: row(name) for name in engines}


def ratios(ours: Rates, peer: Rates) -> Rates:
    """Of each rate, ours over the peer's."""

    def ratio(key: str) -> float | None:
        mine, theirs = ours[key], peer[key]
        return None if mine is None or theirs is None else round(mine / theirs, 3)

    return {key: value if key == "batch" else ratio(key) for key, value in ours.items()}


@contextlib.contextmanager
def started(arguments: argparse.Namespace, batches: list[int]) -> Iterator[dict[str, Engine]]:
    """The engines that were asked for, by name; ours is the first."""
    from tests.support import smollm2

    max_tokens = arguments.prompt_tokens + arguments.new_tokens + 8
    threads = arguments.threads
    scripts = Path(__file__).parent
    sizes = [str(number) for number in (max(batches), max_tokens, threads)]
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:

        def start(name: str, *command: str | Path) -> None:
            log = Path(temporary) / f"{name}.log"
            engines[name] = Engine([str(word) for word in command], threads, log)
            stack.callback(engines[name].stop)

        ours = ["-m", "benchmarks.decode_prefill", "--ours", "--threads", str(threads)]
        tokens = ["--prompt-tokens", str(max_tokens), "--new-tokens", "0"]
        start("nodeweave", sys.executable, *ours, *tokens, *arguments.words)
        if arguments.llama_python:
            (gguf,) = smollm2.files().weight_files
            script = scripts / "llama_cpp_rates.py"
            start("llama.cpp", arguments.llama_python, script, gguf, *sizes)
        if arguments.vllm_python:
            folder = smollm2.write_folder(Path(temporary) / "smollm2")
            script = scripts / "vllm_rates.py"
            start("vllm", arguments.vllm_python, script, folder, *sizes)
        yield engines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="keys of our engine: model.dtype=float32")
    parser.add_argument("--llama-python", help="the Python of an environment with xllamacpp")
    parser.add_argument("--vllm-python", help="the Python of an environment with vLLM")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every engine")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.ours:
        max_tokens = arguments.prompt_tokens + arguments.new_tokens
        serve_ours(arguments.threads, max_tokens, arguments.words)
        return
    batches = [int(batch) for batch in arguments.batches.split(",")]
    report: dict[str, Any] = {
        "benchmark": "decode_prefill",
        "device": "cpu",
        "threads": arguments.threads,
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
    }
    with started(arguments, batches) as engines:
        report |= {name: engine.ready | {"cells": []} for name, engine in engines.items()}
        for engine in engines.values():
            engine.turn(2, 16, 4)
        for batch in batches:
            sizes = (batch, arguments.prompt_tokens, arguments.new_tokens)
            for name, row in rates(engines, sizes, arguments.repeats).items():
                report[name]["cells"].append(row)
    ours, *peers = (name for name in engines)
    report["ratios"] = {
        peer: [
            ratios(a, b) for a, b in zip(report[ours]["cells"], report[peer]["cells"], strict=True)
        ]
        for peer in peers
    }
    report["load_average"] = os.getloadavg()
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
