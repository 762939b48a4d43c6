"""Microseconds of a layer of DeepSeek-V3 in fp8, as one rank of a large plan computes it.

    python -m benchmarks.emulated_rank [--ep 16,32,128] [--cells 32x1024,128x4096]

One GPU runs rank 0 of DP attention + EP-N (`comm=emulated`, `moe_a2a=emulated`): its own experts,
its own requests, and as many received rows as balanced routing gives; links cost nothing here.
Steps are decode steps of BATCHxCONTEXT, replayed as a server replays them; their contexts are made
up. A layer's time is the difference between models of more and fewer layers, so that embedding,
head and sampling drop out. Prints a JSON line for each cell, beside the floor: the bytes of the
layer's weights and of the cache over the memory bandwidth.
"""

import argparse
import gc
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_floor, gpu_heat
from core.resolve import LATENT_PAGE_SIZE

NOMINAL_BYTES_PER_S = 3.35e12  # an H100 SXM's, which the known floors were taken at
NUM_STEPS = 48
REPEATS = 3
VOCABULARY = 8192  # of the head, which drops out of the difference
# (dense layers, MoE layers) of the models that are timed.
MODELS = ((1, 4), (1, 1), (2, 1))
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attention_bias": False,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}


def configuration(
    shape: Mapping[str, Any], cells: Sequence[tuple[int, int]], arguments: argparse.Namespace
) -> Any:
    """Rank 0 of DP attention + EP with room for all cells."""
    from core.settings.config import (
        AppConfig,
        CommConfig,
        EngineConfig,
        ModelConfig,
        MoEAllToAllConfig,
        ParallelConfig,
        PluginChoice,
    )

    longest = max(context for _, context in cells) + NUM_STEPS + 1
    most = max(batch for batch, _ in cells)
    a2a = PluginChoice(name="emulated", options={"layout": arguments.layout})
    emulated = PluginChoice(name="emulated")
    pages = max(batch * pages_of(context) for batch, context in cells)
    ep = arguments.rank_ep
    return AppConfig(
        model=ModelConfig(
            name="emulated_rank",
            shape=dict(shape),
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=longest,
        ),
        parallel=ParallelConfig(
            plan="dp_attention", tp=ep, ep=ep, dp_attention=ep, dp_lm_head=True
        ),
        comm=CommConfig(tp=emulated, ep=emulated),
        moe_a2a=MoEAllToAllConfig(prefill=a2a, decode=a2a),
        engine=EngineConfig(
            device=arguments.device,
            max_running_requests=most,
            kv_cache_tokens=(pages + 1) * LATENT_PAGE_SIZE,
            max_prefill_tokens=256,
            chunked_prefill_size=256,
            disable_prefix_cache=True,
        ),
    )


def pages_of(context: int) -> int:
    """Pages of a request from its context on."""
    return -(-(context + NUM_STEPS + 1) // LATENT_PAGE_SIZE)


def first_plan(batch: int, context: int) -> Any:
    """A decode step whose requests have `context` tokens, on pages of their own."""
    from core.interfaces.messages import SamplingParams, ScheduledStep, SlotInit

    params = SamplingParams(max_tokens=NUM_STEPS + 1, temperature=0.0, ignore_eos=True)
    count = pages_of(context)
    slots = list(range(batch))
    return ScheduledStep(
        step=0,
        inits=[SlotInit(slot, [0], context, params, 0) for slot in slots],
        num_decodes=batch,
        slots=slots,
        starts=[context - 1] * batch,
        lengths=[1] * batch,
        samples=[True] * batch,
        table_slots=[slot for slot in slots for _ in range(count)],
        table_columns=list(range(count)) * batch,
        table_pages=[1 + slot * count + column for slot in slots for column in range(count)],
    )


def later_plan(first: Any, step: int) -> Any:
    """The step that comes so many after the first."""
    import msgspec

    return msgspec.structs.replace(
        first,
        inits=[],
        starts=[start + step for start in first.starts],
        table_slots=[],
        table_columns=[],
        table_pages=[],
    )


def step_us(lone: Any, batch: int, context: int) -> float:
    """Microseconds of a decode step, launched one ahead as the engine's loop does."""
    from core.engine.run.lockstep import rank_facts, settle
    from core.interfaces.messages import AgreedStep

    first = first_plan(batch, context)
    num_dp = lone.resolved.plan.dp

    def agreed(plan: Any) -> Any:
        return AgreedStep(plan, settle([rank_facts(0, plan, busy=True)] * num_dp).facts)

    steps = [agreed(first), *(agreed(later_plan(first, step)) for step in range(1, NUM_STEPS))]
    warm = NUM_STEPS // 6
    best = float("inf")
    for _ in range(REPEATS):
        waiting = None
        began = 0.0
        for index, step in enumerate(steps):
            wait = lone.engine.executor.launch(step)
            if waiting is not None:
                waiting()
            waiting = wait
            if index == warm:
                began = time.perf_counter()
        waiting()
        best = min(best, (time.perf_counter() - began) / (NUM_STEPS - warm))
    return best * 1e6


def times_of(
    shape: Mapping[str, Any], cells: Sequence[tuple[int, int]], arguments: argparse.Namespace
) -> list[float]:
    """Step times of one model, by cell."""
    from core.engine.local.in_process import build_in_process

    lone = build_in_process(configuration(shape, cells, arguments))
    watch = gpu_heat.Watch()
    times = [step_us(lone, batch, context) for batch, context in cells]
    watch.look()
    del lone
    gc.collect()
    if arguments.device == "cuda":
        import torch

        torch.cuda.empty_cache()
    return times


def layer_bytes(shape: Mapping[str, Any], ep: int, batch: int, context: int) -> tuple[float, float]:
    """What an MoE layer and a dense layer of this rank read in a step: every local expert, as
    many rows come for each."""
    layer = dict(shape) | {"num_hidden_layers": 1, "vocab_size": 0}
    moe = gpu_floor.sizes_of(layer | {"first_k_dense_replace": 0})
    dense = gpu_floor.sizes_of(layer | {"first_k_dense_replace": 1})
    cache = batch * context * moe.kv_token_bytes
    # Each of the T * K pairs that come is for one of the local experts at random.
    local = shape["n_routed_experts"] / ep
    hit = local * (1 - (1 - 1 / local) ** (batch * shape["num_experts_per_tok"]))
    return moe.weight_bytes + hit * moe.expert_bytes + cache, dense.weight_bytes + cache


def measure(arguments: argparse.Namespace, bytes_per_s: float | None) -> list[dict[str, Any]]:
    """A row for each cell of one EP size."""
    shape = dict(DEEPSEEK_V3)
    if arguments.shape is not None:
        shape |= json.loads(arguments.shape.read_text())
    cells = [tuple(map(int, cell.split("x"))) for cell in arguments.cells.split(",")]
    times = {}
    for num_dense, num_moe in MODELS:
        layers = {"num_hidden_layers": num_dense + num_moe, "first_k_dense_replace": num_dense}
        times[num_dense, num_moe] = times_of(shape | layers, cells, arguments)
    rows = []
    for index, (batch, context) in enumerate(cells):
        by_model = {model: found[index] for model, found in times.items()}
        moe_us = (by_model[1, 4] - by_model[1, 1]) / 3
        dense_us = by_model[2, 1] - by_model[1, 1]
        row: dict[str, Any] = {
            "benchmark": "emulated_rank",
            "ep": arguments.rank_ep,
            "batch": batch,
            "context": context,
            "layout": arguments.layout,
            "moe_layer_us": round(moe_us, 1),
            "dense_layer_us": round(dense_us, 1),
            "step_us": {f"{d}+{m}": round(us, 1) for (d, m), us in by_model.items()},
        }
        moe_bytes, dense_bytes = layer_bytes(shape, arguments.rank_ep, batch, context)
        row["moe_floor_us"] = round(moe_bytes / NOMINAL_BYTES_PER_S * 1e6, 1)
        row["moe_share"] = round(row["moe_floor_us"] / moe_us, 3)
        row["dense_floor_us"] = round(dense_bytes / NOMINAL_BYTES_PER_S * 1e6, 1)
        if bytes_per_s is not None:
            row["moe_floor_at_copy_us"] = round(moe_bytes / bytes_per_s * 1e6, 1)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ep", default="16,32,128", help="sizes of EP = DP attention")
    parser.add_argument("--cells", default="32x1024,128x4096", help="BATCHxCONTEXT of a rank")
    parser.add_argument(
        "--layout", default="contiguous", choices=["contiguous", "batched", "routed"]
    )
    parser.add_argument("--shape", type=Path, help="JSON of sizes to change, to try it out")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    bytes_per_s = None
    if arguments.device == "cuda":
        device = gpu_floor.measure_device()
        bytes_per_s = device.bytes_per_s
        print(json.dumps(device.describe()), flush=True)
    for ep in arguments.ep.split(","):
        arguments.rank_ep = int(ep)
        for row in measure(arguments, bytes_per_s):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
