"""Times the Triton mixture-of-experts operations on a GPU, one layer at a time, and prints JSON.

    python -m benchmarks.gpu_moe

Shapes are those of one rank: DeepSeek-V3 over 16 ranks of experts (fp8 blocks) and Qwen3-30B-A3B on
one (bf16). Experts are compared with the time their weights take over the memory bandwidth, and
with the same arithmetic at 100% of what a large product of torch reaches; linear layers of fp8
blocks with torch's bf16 product of the same shape. Knows nothing of what carries rows.
"""

import json
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from core.interfaces.moe_a2a import Dispatched
from core.interfaces.routing import Routing
from core.interfaces.weights import BlockFp8, LinearWeight
from core.kernels.torch_moe import matrix_of
from core.kernels.triton_ops import TritonOps

DEVICE = torch.device("cuda")
# (local experts, hidden size, intermediate size, fp8)
EXPERTS = {"deepseek_v3_ep16": (16, 7168, 2048, True), "qwen3_30b_a3b": (128, 2048, 768, False)}
ROWS_OF_AN_EXPERT = (1, 8, 64, 512)
LINEARS = {"q_a_kv_a": (2112, 7168), "q_b": (24576, 1536), "o": (7168, 16384)}
ROWS = (1, 16, 128, 4096)
V3 = Routing(
    top_k=8,
    scoring="sigmoid",
    normalise=True,
    scale=2.5,
    num_groups=8,
    num_chosen_groups=4,
    group_top=2,
)


def microseconds(run: Callable[[], object]) -> float:
    """Median over replays of a CUDA graph, so that launches from Python don't count; weights do
    not stay in the cache from one to the next."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return 1e3 * float(triton.testing.do_bench(graph.replay, return_mode="median"))


def random_weight(fp8: bool, *shape: int) -> LinearWeight:
    values = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) * shape[-1] ** -0.5
    if not fp8:
        return values
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scales = torch.full(blocks, 1 / 400, device=DEVICE)
    return BlockFp8((values * 400).to(torch.float8_e4m3fn), scales)


def peaks() -> tuple[float, float]:
    """Bytes a second of a large copy, and operations a second of a large bf16 product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy_us = microseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    product_us = microseconds(lambda: a @ b)
    return 2 * source.numel() / copy_us * 1e6, 2 * 8192**3 / product_us * 1e6


def time_experts(ops: TritonOps, bandwidth: float, speed: float) -> list[dict[str, object]]:
    results = []
    for name, (num_experts, hidden_size, size, fp8) in EXPERTS.items():
        gate_up = random_weight(fp8, num_experts, 2 * size, hidden_size)
        down = random_weight(fp8, num_experts, hidden_size, size)
        pairs = [(matrix_of(gate_up, i), matrix_of(down, i)) for i in range(num_experts)]
        kernel = ops.experts(pairs, num_experts, torch.bfloat16)
        weight_bytes = 3 * num_experts * hidden_size * size * (1 if fp8 else 2)
        for rows in ROWS_OF_AN_EXPERT:
            counts_L = torch.full((num_experts,), rows, device=DEVICE)
            num_rows = rows * num_experts
            x = torch.randn(num_rows, hidden_size, dtype=torch.bfloat16, device=DEVICE)
            flat = Dispatched(x, counts_L, None)
            padded_LCE = x.new_zeros(num_experts, max(2 * rows, 128), hidden_size)
            padded_LCE[:, :rows] = x.view(num_experts, rows, hidden_size)
            padded = Dispatched(padded_LCE, counts_L, None)
            operations = 6 * num_rows * hidden_size * size
            results.append(
                {
                    "experts": name,
                    "rows_of_an_expert": rows,
                    "contiguous_us": round(microseconds(partial(kernel, flat)), 1),
                    "batched_us": round(microseconds(partial(kernel, padded)), 1),
                    "weights_us": round(weight_bytes / bandwidth * 1e6, 1),
                    "bf16_arithmetic_us": round(operations / speed * 1e6, 1),
                }
            )
    return results


def time_linears(ops: TritonOps) -> list[dict[str, object]]:
    results = []
    for name, (outputs, inputs) in LINEARS.items():
        kernel = ops.linear(random_weight(True, outputs, inputs), None)
        plain = random_weight(False, outputs, inputs)
        assert isinstance(plain, Tensor)
        for rows in ROWS:
            x = torch.randn(rows, inputs, dtype=torch.bfloat16, device=DEVICE)
            results.append(
                {
                    "linear": name,
                    "rows": rows,
                    "fp8_us": round(microseconds(partial(kernel, x)), 1),
                    "torch_bf16_us": round(microseconds(partial(F.linear, x, plain)), 1),
                }
            )
    return results


def time_routing(ops: TritonOps) -> list[dict[str, object]]:
    gate = ops.gate(torch.randn(256, 7168, dtype=torch.bfloat16, device=DEVICE))
    bias_X = torch.randn(256, device=DEVICE)
    results = []
    for rows in ROWS:
        x = torch.randn(rows, 7168, dtype=torch.bfloat16, device=DEVICE)
        logits = gate(x)
        results.append(
            {
                "routing": "deepseek_v3",
                "rows": rows,
                "gate_us": round(microseconds(partial(gate, x)), 1),
                "top_k_us": round(microseconds(partial(ops.grouped_top_k, logits, bias_X, V3)), 1),
            }
        )
    return results


def main() -> None:
    torch.manual_seed(0)
    bandwidth, speed = peaks()
    ops = TritonOps()
    report = {
        "device": torch.cuda.get_device_name(),
        "bandwidth_gb_s": round(bandwidth / 1e9),
        "bf16_tflop_s": round(speed / 1e12),
        "results": time_routing(ops) + time_linears(ops) + time_experts(ops, bandwidth, speed),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
