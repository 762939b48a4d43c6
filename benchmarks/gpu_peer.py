"""Rates of vLLM or SGLang on dummy weights, with the peer's own Python.

    python gpu_peer.py vllm|sglang MODEL_DIR BATCHES [PROMPT_TOKENS] [NEW_TOKENS] [--mixed] [--ttft]

Run by `benchmarks.gpu_engine --peer`. Imports nothing of Nodeweave but the cells and the watch over
the device's heat beside it. Prints the same JSON lines. Routing is forced through the environment:

    VLLM_MOE_ROUTING_SIMULATION_STRATEGY=uniform_random   draws with replacement
    SGLANG_SIMULATE_UNIFORM_EXPERTS=1   a random one and others in equal steps (Qwen)

which each line then says, with the distinct experts of a layer that a decode step is expected to
read: with replacement a few less than ours.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import gpu_cells as cells

MEMORY_SHARE = 0.85


def start_vllm(model: str, longest: int, requests: int) -> cells.Generate:
    from vllm import LLM, SamplingParams

    engine: Any = LLM(
        model=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=requests,
        gpu_memory_utilization=MEMORY_SHARE,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        outputs = engine.generate(given, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)

    return generate


def start_sglang(model: str, longest: int, requests: int) -> cells.Generate:
    import sglang

    engine: Any = sglang.Engine(
        model_path=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        disable_radix_cache=True,
        sampling_backend="pytorch",
        context_length=longest,
        max_running_requests=requests,
        mem_fraction_static=MEMORY_SHARE,
        log_level="error",
    )

    def generate(prompts: list[list[int]], new_tokens: int) -> None:
        params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        outputs = engine.generate(input_ids=prompts, sampling_params=params)
        assert len(outputs) == len(prompts)

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description="Rates of a peer on dummy weights.")
    parser.add_argument("engine", choices=["vllm", "sglang"])
    cells.add_arguments(parser)
    arguments = parser.parse_args()
    folder = Path(arguments.model_dir)
    experts = cells.experts_of(json.loads((folder / "config.json").read_text()))
    common: dict[str, Any] = {"engine": arguments.engine, "model": folder.name}
    routing = forced_routing(arguments.engine) if experts[0] else None
    if routing:
        common["routing"] = routing
    begin = time.perf_counter()
    start = {"vllm": start_vllm, "sglang": start_sglang}[arguments.engine]
    generate = start(arguments.model_dir, *cells.limits(arguments))
    cells.put(common | {"startup_s": round(time.perf_counter() - begin, 1)})
    for row in cells.measure(generate, arguments):
        if routing and row["cell"] == "decode":
            replacement = arguments.engine == "vllm"
            read = cells.distinct_experts(*experts, row["batch"], replacement=replacement)
            row["distinct_experts"] = round(read, 1)
        cells.put(common | row)


def forced_routing(engine: str) -> str | None:
    """How the environment has a peer choose experts."""
    if engine == "vllm":
        strategy = os.environ.get("VLLM_MOE_ROUTING_SIMULATION_STRATEGY")
        return f"{strategy}, with replacement" if strategy == "uniform_random" else strategy
    forced = os.environ.get("SGLANG_SIMULATE_UNIFORM_EXPERTS", "").lower() in ("1", "true")
    return "uniform_random, in equal steps" if forced else None


if __name__ == "__main__":
    main()
