"""Does every benchmark that needs no GPU still run? Each for a few seconds, as small as it can be.

    python -m benchmarks.smoke [NAME ...]

Prints a line for each: seconds, or why not. One passes if it ends with status 0 and printed JSON.
No figure is looked at, and none that comes of it means anything. Ends with status 1 where one
failed. SmolLM2 is fetched where it is not in the cache yet.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from core.settings.compose import compose, parse_overrides

LIMIT_S = 300.0  # of one; of a machine that has other things to do
MODEL_DIR = "MODEL_DIR"  # stands for a folder that holds the config.json of a tiny model
PRESET = "qwen3_moe_tiny"
SMALLEST = {
    "a2a_bytes": ["--rows", "4", "--ep", "4"],
    "cpu_ops": ["--dtype", "float32", "--context", "16", "--seconds", "0.02"],
    "cut_sampler": ["--rows", "2", "--vocab", "512"],
    "decode_prefill": [
        "--batches", "1", "--prompt-tokens", "16", "--new-tokens", "2", "--repeats", "1",
    ],
    "eplb_balance": ["--ep", "8"],
    "host_engine": [
        MODEL_DIR, "--device", "cpu", "--batch", "2", "--context", "8", "--steps", "5",
    ],
    "host_step": ["--batch", "4", "--steps", "5", "--context", "20"],
    "http_layer": ["--clients", "2", "--tokens", "20", "--repeats", "1"],
    "load_weights": ["--gib", "0.02"],
    "lockstep_round": ["--rounds", "50"],
    "prompt_order": [],
    "sampler": ["--rows", "2", "--vocab", "512", "--seconds", "0.01"],
    "scheduler_step": ["--steps", "5"],
    "serve_client": ["--clients", "4", "--tokens", "10"],
    "serve_http": [
        MODEL_DIR, "--in", "16", "--out-tokens", "4", "--requests", "4", "--paced-s", "1",
        "--loads", "all_at_once", "--set", "engine.device=cpu", "engine.kv_cache_tokens=4096",
    ],
    "serve_simulation": ["--in", "64", "--out-tokens", "8", "--loads", "all_at_once"],
    "short_beside_long": [
        "--turns", "1", "--orders", "shared", "--longs", "2", "--long-tokens", "64",
        "--shorts", "3", "--every-s", "0.05", "--answer-tokens", "2",
    ],
    "startup": ["--shape", f"{MODEL_DIR}/config.json", "--device", "cpu"],
}  # fmt: skip
# Programs that are left out, and why.
LEFT_OUT = {
    "gpu_": "they need a GPU",
    "emulated_rank": "it needs a GPU",
    "tune": "it needs a GPU",
    "llama_cpp_rates": "a peer's Python runs it",
    "vllm_rates": "a peer's Python runs it",
    "hostile_load": "it judges what it measures, and takes minutes",
    "soak": "it judges the memory that many steps take; a test runs it with few",
    "smoke": "this one",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that are named, or all; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *SMALLEST], metavar="NAME")
    names = parser.parse_args(arguments).names or list(SMALLEST)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder))
        for name in names:
            begin_s = time.perf_counter()
            words = [word.replace(MODEL_DIR, folder) for word in SMALLEST[name]]
            problem = run([sys.executable, "-m", f"benchmarks.{name}", *words])
            print(f"{name}: {problem or f'{time.perf_counter() - begin_s:.1f} s'}", flush=True)
            if problem is not None:
                failed.append(name)
    if failed:
        print(f"{len(failed)} of {len(names)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def write_config(folder: Path) -> None:
    """The config.json of a tiny model."""
    shape = compose(parse_overrides([f"+model={PRESET}"])).model.shape
    (folder / "config.json").write_text(json.dumps(shape))


def run(command: Sequence[str], limit_s: float = LIMIT_S) -> str | None:
    """What is wrong with what a program did; None: nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"it did not end within {limit_s:.0f} s"
    if done.returncode != 0:
        return f"status {done.returncode}\n{done.stderr.strip()[-2000:]}"
    if not holds_json(done.stdout):
        return f"it printed no JSON:\n{done.stdout.strip()[-500:]}"
    return None


def holds_json(text: str) -> bool:
    """Whether a text is JSON, or has a line that is a JSON object."""
    for candidate in (text, *text.splitlines()):
        try:
            if isinstance(json.loads(candidate), dict | list):
                return True
        except ValueError:
            continue
    return False


if __name__ == "__main__":
    sys.exit(main())
