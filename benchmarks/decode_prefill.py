"""Offline decode and prefill rates on SmolLM2-135M, bf16, against vLLM in the same run.

    python -m benchmarks.decode_prefill --peer-python /path/to/vllm/bin/python

Prompts are random tokens, greedy, prefix cache off. A cell is the best of three: seconds to the
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


def our_rates(folder: Path, batches: list[int], prompt_tokens: int, new_tokens: int) -> list[Row]:
    """A row per batch size."""
    model = folder_model(folder, dtype="bfloat16", max_model_len=2048)
    start = time.perf_counter()
    config = app_config(model, engine={"disable_prefix_cache": True, "kv_cache_tokens": 16384})
    with offline_engine(config) as engine:
        startup_s = time.perf_counter() - start

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
        rows = []
        for batch in batches:
            prefill = min(seconds(batch, 1) for _ in range(3))
            full = min(seconds(batch, new_tokens + 1) for _ in range(3))
            rows.append(
                {
                    "batch": batch,
                    "prefill_tok_s": batch * prompt_tokens / prefill,
                    "decode_tok_s": batch * new_tokens / (full - prefill),
                    "startup_s": startup_s,
                }
            )
    return rows


def peer_rates(
    python: str, folder: Path, batches: list[int], prompt_tokens: int, new_tokens: int
) -> list[Row]:
    """The same rows from vLLM."""
    script = Path(__file__).with_name("vllm_rates.py")
    command = [python, str(script), str(folder), ",".join(map(str, batches))]
    completed = subprocess.run(
        [*command, str(prompt_tokens), str(new_tokens)],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if completed.returncode:
        sys.exit(f"the peer failed:\n{completed.stderr[-2000:]}")
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
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    sizes = (batches, arguments.prompt_tokens, arguments.new_tokens)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or smollm2.write_folder(Path(temporary))
        ours = our_rates(folder, *sizes)
        report: dict[str, object] = {"benchmark": "decode_prefill", "device": "cpu"}
        if arguments.peer_python:
            peer = peer_rates(arguments.peer_python, folder, *sizes)
            ours = better(ours, our_rates(folder, *sizes))
            report["vllm"] = peer
            report["ratio"] = [
                {
                    "batch": a["batch"],
                    "prefill": round(a["prefill_tok_s"] / b["prefill_tok_s"], 3),
                    "decode": round(a["decode_tok_s"] / b["decode_tok_s"], 3),
                }
                for a, b in zip(ours, peer, strict=True)
            ]
        report["nodeweave"] = ours
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
