"""How even experts' loads become by placing them (EPLB), and how much has to move for it.

    python -m benchmarks.eplb_balance

Two loads over 256 experts: "zipf", popularity falling with 1 / rank; and "trace", what a small
model of DeepSeek-V3's family with random weights routes of this repository's documentation, byte by
byte (a row for each of its layers). Experts are placed by one half of the load (other draws,
earlier text), and judged by the other. Prints one JSON object. Numbers are rows of the busiest rank
over the mean rank's: experts in order, placed without redundant experts, placed with; then experts
that ranks fetch for placing anew by the second half, and milliseconds to find a placement.
"""

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from core.devices.native_dtypes import native_dtypes
from core.engine.build.context import RankContext
from core.engine.build.rank import build_rank
from core.engine.local.offline import OfflineEngine
from core.engine.run.expert_balance import GATHER_STEPS, READ_DELAY_STEPS
from core.interfaces.comm import SOLO
from core.interfaces.messages import ExpertLoads, SamplingParams
from core.parallel.eplb import balanced_placement, imbalance
from core.parallel.experts import LayerPlacement, default_placement
from core.plugin.plugin_manager import PluginManager
from core.resolve import resolve
from core.settings.config import ModelConfig
from core.sources.files import resolve_files
from tests.support.engine import app_config

NUM_EXPERTS, TOP_K = 256, 8
ROWS_OF_A_HALF = 200_000  # of the made-up load
TOKENS_PER_STEP = 128
ROOT = Path(__file__).parents[1]
# DeepSeek-V3's routing over small layers.
SHAPE: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 64,
    "kv_lora_rank": 32,
    "max_position_embeddings": 2048,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 16,
    "n_group": 8,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": TOP_K,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "v_head_dim": 16,
    "vocab_size": 257,
}


def zipf_halves(seed: int) -> list[list[int]]:
    """Two draws from the same popularity."""
    generator = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(NUM_EXPERTS)]
    generator.shuffle(weights)
    halves = []
    for _ in range(2):
        drawn = Counter(generator.choices(range(NUM_EXPERTS), weights, k=ROWS_OF_A_HALF))
        halves.append([drawn[expert] for expert in range(NUM_EXPERTS)])
    return halves


def trace_halves() -> list[list[list[int]]]:
    """By layer: the rows of each expert in two runs of steps, one after the other."""
    config = app_config(
        ModelConfig(name="trace", shape=SHAPE, load_format="dummy"),
        engine={"max_prefill_tokens": TOKENS_PER_STEP, "kv_cache_tokens": 16384},
    )
    plugins = PluginManager.load([])
    files = resolve_files(config.model, plugins, lambda *_: None)
    resolved = resolve(config, plugins, files, "cpu", native_dtypes())
    rank = build_rank(
        resolved.config,
        RankContext(
            plugins=plugins,
            files=files,
            plan=resolved.plan,
            rank=0,
            comms=SOLO,
            device=torch.device("cpu"),
            local_ranks=1,
            on_phase=lambda *_: None,
            on_progress=lambda *_: None,
        ),
    )
    engine = OfflineEngine(rank)
    text = b"".join(path.read_bytes() for path in sorted(ROOT.glob("docs/*.md")))
    # Summed after each 100 steps, known some steps later.
    num_steps = 2 * GATHER_STEPS + READ_DELAY_STEPS
    for step in range(num_steps):
        start = step * TOKENS_PER_STEP % (len(text) - TOKENS_PER_STEP)
        engine.submit(list(text[start : start + TOKENS_PER_STEP]), SamplingParams(max_tokens=1))
    found: list[ExpertLoads] = []
    while engine.has_work:
        engine.step()
        loads = rank.expert_balancer.take_loads()
        if loads is not None:
            found.append(loads)
    first, both = (loads.rows for loads in found[:2])
    return [
        [mine, [b - a for a, b in zip(mine, sums, strict=True)]]
        for mine, sums in zip(first, both, strict=True)
    ]


def num_fetched(old: LayerPlacement, new: LayerPlacement) -> int:
    """Experts that a rank has to get from another one."""
    return sum(
        (Counter(new.local(rank)) - Counter(old.local(rank))).total() for rank in range(old.ep)
    )


def measured(halves: list[list[int]], ep: int, redundant: int) -> dict[str, float]:
    """One row of the result."""
    first, second = halves
    plain = default_placement(NUM_EXPERTS, ep, 0)
    start = default_placement(NUM_EXPERTS, ep, redundant)
    begin = time.perf_counter()
    placed = balanced_placement(first, start)
    seconds = time.perf_counter() - begin
    again = balanced_placement(second, placed)
    return {
        "in_order": imbalance(plain, second),
        "without_redundant": imbalance(balanced_placement(first, plain), second),
        "placed": imbalance(placed, second),
        "placed_on_its_own_half": imbalance(placed, first),
        "placed_anew": imbalance(again, second),
        "fetched_anew": num_fetched(placed, again),
        "plan_ms": seconds * 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ep", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--redundant", type=int, default=32)
    arguments = parser.parse_args()
    loads = {"zipf": zipf_halves(0)}
    for layer, halves in enumerate(trace_halves()):
        loads[f"trace_layer_{layer}"] = halves
    rows = [
        {"load": name, "ep": ep}
        | {key: round(value, 3) for key, value in measured(halves, ep, arguments.redundant).items()}
        for name, halves in loads.items()
        for ep in arguments.ep
    ]
    print(json.dumps({"experts": NUM_EXPERTS, "redundant": arguments.redundant, "rows": rows}))


if __name__ == "__main__":
    main()
