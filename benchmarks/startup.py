"""Seconds from the start of a process to the first token, with dummy weights, by phase.

    python -m benchmarks.startup --shape config.json [--device cuda] [--keep-cache] [--runs 1]

Each run is a process of its own: interpreter, imports, device, weights, KV pool, kernels, warm-up,
and one prompt of 1,024 tokens until its first token is there. Unless `--keep-cache`, the first run
finds no compiled kernel; the runs after it find those of the first. Prints one JSON object:
seconds by phase, kernels that were compiled, and what the engine holds in memory.
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
from typing import Any

PROMPT_TOKENS = 1024
NUM_SLOWEST = 8  # kernels listed


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One start in this process, which began at `arguments.began_s` of the wall clock."""
    phases: dict[str, float] = {"interpreter": time.time() - arguments.began_s}
    last_s = time.time()

    def end(name: str) -> None:
        nonlocal last_s
        now = time.time()
        phases[name], last_s = now - last_s, now

    import torch

    from core.devices.native_dtypes import native_dtypes
    from core.engine.build.context import RankContext
    from core.engine.build.device import open_device
    from core.engine.build.rank import build_rank
    from core.engine.local.offline import OfflineEngine
    from core.interfaces.comm import SOLO
    from core.interfaces.messages import SamplingParams
    from core.plugin.plugin_manager import PluginManager
    from core.resolve import resolve
    from core.sources.files import resolve_files

    end("import")
    compiled = watch_compilations() if arguments.device == "cuda" else []
    name = "cuda:0" if arguments.device == "cuda" else arguments.device
    device = open_device(name, os.cpu_count() or 1)
    end("device")
    config = configuration(arguments)
    plugins = PluginManager.load([])
    files = resolve_files(config.model, plugins, lambda *_: None)
    resolved = resolve(config, plugins, files, arguments.device, native_dtypes())
    end("resolve")
    rank = build_rank(
        resolved.config,
        RankContext(
            plugins=plugins,
            files=files,
            plan=resolved.plan,
            rank=0,
            comms=SOLO,
            device=device,
            local_ranks=1,
            on_phase=lambda name, seconds: phases.__setitem__(name, seconds),
            on_progress=lambda *_: None,
        ),
    )
    last_s = time.time()
    num_compiled = len(compiled)
    engine = OfflineEngine(rank)
    prompt = [random.randrange(10, 250) for _ in range(min(PROMPT_TOKENS, rank.max_model_len - 2))]
    engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    end("first token")
    total_s = time.time() - arguments.began_s
    compiled.sort(key=lambda kernel: -kernel[1])
    return {
        "total_s": round(total_s, 2),
        "phases": {name: round(seconds, 2) for name, seconds in phases.items()},
        "kernels_compiled": len(compiled),
        "compiled_after_start": len(compiled) - num_compiled,
        "compile_s": round(sum(seconds for _, seconds in compiled), 2),
        "slowest_kernels": [(name, round(s, 2)) for name, s in compiled[:NUM_SLOWEST]],
        "engine": rank.describe(),
        "torch": torch.__version__,
    }


def watch_compilations() -> list[tuple[str, float]]:
    """A list that grows by (name, seconds) with every Triton kernel that is compiled."""
    import triton

    compiled: list[tuple[str, float]] = []

    def listen(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            compiled.append((getattr(src, "name", "?"), times.total / 1e6))

    triton.knobs.compilation.listener = listen
    return compiled


def configuration(arguments: argparse.Namespace) -> Any:
    """A model of that shape, alone on one device."""
    from core.settings.config import AppConfig, EngineConfig, ModelConfig

    shape = json.loads(arguments.shape.read_text())
    limits = {} if arguments.device == "cuda" else {"kv_cache_tokens": 4096}
    return AppConfig(
        model=ModelConfig(
            name="startup",
            shape=shape,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=min(arguments.max_model_len, shape["max_position_embeddings"]),
        ),
        engine=EngineConfig(device=arguments.device, **limits),
    )


def run_child(words: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """What one process says of itself."""
    completed = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", *words, "--began-s", str(time.time())],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if completed.returncode:
        return {"error": completed.stderr[-3000:]}
    found: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=Path, required=True, help="the config.json of a model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--keep-cache", action="store_true", help="use the caches there are")
    parser.add_argument("--began-s", type=float, help="of the child; not to be given by hand")
    arguments = parser.parse_args()
    if arguments.began_s is not None:
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        fresh = {"TRITON_CACHE_DIR": f"{folder}/triton", "NODEWEAVE_CACHE": f"{folder}/nodeweave"}
        environment = {} if arguments.keep_cache else fresh
        words = ["--shape", str(arguments.shape), "--device", arguments.device]
        words += ["--max-model-len", str(arguments.max_model_len)]
        runs = [run_child(words, environment) for _ in range(arguments.runs)]
    print(json.dumps({"benchmark": "startup", "shape": arguments.shape.name, "runs": runs}))


if __name__ == "__main__":
    main()
