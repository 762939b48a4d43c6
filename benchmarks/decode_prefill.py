"""Offline decode and prefill rates on SmolLM2-135M, bf16, against vLLM in the same run.

    python -m benchmarks.decode_prefill --peer-python /path/to/vllm/bin/python

Either engine runs in a process of its own. Prompts are random tokens, greedy, prefix cache off. A
cell is the best of three: seconds to the
first token of the whole batch give the prefill rate, the seconds of `--new-tokens` more tokens
the decode rate. Ours runs before and after the peer and the better one counts, as the peer's
start-up keeps the machine warm for it. Prints one JSON object; without a peer it has no ratios.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from core.interfaces.messages import SamplingParams
from tests.support import smollm2
from tests.support.engine import app_config, folder_model, offline_engine

Row = dict[str, float]
Sizes = tuple[list[int], int, int]  # batches, tokens of a prompt, tokens generated


def print_our_rates(folder: Path, sizes: Sizes) -> None:
    """The start-up seconds, then a row per batch size, as JSON lines."""
    batches, prompt_tokens, new_tokens = sizes
    model = folder_model(folder, dtype="bfloat16", max_model_len=2048)
    start = time.perf_counter()
    config = app_config(model, engine={"disable_prefix_cache": True, "kv_cache_tokens": 16384})
    with offline_engine(config) as engine:
        print(json.dumps({"startup_s": time.perf_counter() - start}), flush=True)

        def seconds(batch: int, tokens: int) -> float:
            prompts = [
                [random.randrange(10, 40000) for _ in range(prompt_tokens)] for _ in range(batch)
            ]
            params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            begin = time.perf_counter()
            answers = engine.generate(prompts, params)
            elapsed = time.perf_counter() - begin
            assert all(len(answer.token_ids) == tokens for answer in answers)
            return elapsed

        seconds(2, 4)
        for batch in batches:
            prefill = min(seconds(batch, 1) for _ in range(3))
            full = min(seconds(batch, new_tokens + 1) for _ in range(3))
            row = {
                "batch": batch,
                "prefill_tok_s": batch * prompt_tokens / prefill,
                "decode_tok_s": batch * new_tokens / (full - prefill),
            }
            print(json.dumps(row), flush=True)


def rates_of(words: list[str]) -> list[Row]:
    """The rows that a program prints as JSON lines."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    completed = subprocess.run(
        words, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if completed.returncode:
        sys.exit(f"{words[0]} failed:\n{completed.stderr[-2000:]}")
    lines = [json.loads(line) for line in completed.stdout.splitlines() if line.startswith("{")]
    return [row | lines[0] for row in lines[1:]]


def better(first: list[Row], second: list[Row]) -> list[Row]:
    """Row by row, the higher rates of two runs."""
    return [
        {key: min(a[key], b[key]) if key == "startup_s" else max(a[key], b[key]) for key in a}
        for a, b in zip(first, second, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="the Python of an environment with vLLM")
    parser.add_argument("--folder", type=Path, help="a Hugging Face folder; default: SmolLM2")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--ours", action="store_true", help="print our rows and nothing else")
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    sizes = (batches, arguments.prompt_tokens, arguments.new_tokens)
    if arguments.ours:
        print_our_rates(arguments.folder, sizes)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or smollm2.write_folder(Path(temporary))
        print(json.dumps(compare(folder, sizes, arguments.peer_python), indent=1))


def compare(folder: Path, sizes: Sizes, peer_python: str | None) -> dict[str, object]:
    """Both engines' rows and their ratios."""
    batches, prompt_tokens, new_tokens = sizes

    def ours() -> list[Row]:
        flags = {
            "--folder": folder,
            "--batches": ",".join(map(str, batches)),
            "--prompt-tokens": prompt_tokens,
            "--new-tokens": new_tokens,
        }
        words = [str(word) for pair in flags.items() for word in pair]
        return rates_of([sys.executable, "-m", "benchmarks.decode_prefill", "--ours", *words])

    report: dict[str, object] = {"benchmark": "decode_prefill", "device": "cpu"}
    rows = ours()
    if peer_python:
        script = Path(__file__).with_name("vllm_rates.py")
        peer = rates_of(
            [
                *(peer_python, str(script), str(folder)),
                *(",".join(map(str, batches)), str(prompt_tokens), str(new_tokens)),
            ]
        )
        rows = better(rows, ours())
        report["vllm"] = peer
        report["ratio"] = [
            {
                "batch": a["batch"],
                "prefill": round(a["prefill_tok_s"] / b["prefill_tok_s"], 3),
                "decode": round(a["decode_tok_s"] / b["decode_tok_s"], 3),
            }
            for a, b in zip(rows, peer, strict=True)
        ]
    report["nodeweave"] = rows
    return report


if __name__ == "__main__":
    main()
