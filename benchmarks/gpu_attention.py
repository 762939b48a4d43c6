"""Times the Triton attention backend on a GPU, one layer at a time, and prints JSON.

    python -m benchmarks.gpu_attention

Decode is compared with the bytes of k and v over the memory bandwidth of a large copy; prefill
with torch's own fused attention over contiguous k and v (no pages). Ratios above 1 are faster
than that. Knows nothing of models: shapes are those of one layer.
"""

import json
from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
import triton

from core.hookspecs import NoOptions
from core.interfaces.attention import AttentionSpec, LayerKV, SequenceBatch
from plugins.attention._triton_backend import TritonBackend, build

DEVICE = torch.device("cuda")
PAGE_SIZE = 16
SHAPES = {"smollm2": (9, 3, 64), "llama31_8b": (32, 8, 128)}


def microseconds(run: Callable[[], object]) -> float:
    """Median over replays of a CUDA graph, so that launches from Python don't count."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return 1e3 * float(triton.testing.do_bench(graph.replay, return_mode="median"))


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (microseconds(lambda: target.copy_(source)) * 1e-6)


def make(
    shape: tuple[int, int, int], rows: list[int], contexts: list[int]
) -> tuple[TritonBackend, SequenceBatch, LayerKV, torch.Tensor]:
    """A backend, a batch over permuted pages, a cache of random values, and queries."""
    num_heads, num_kv_heads, head_dim = shape
    spec = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        page_size=PAGE_SIZE,
        dtype=torch.bfloat16,
        device=DEVICE,
        max_context_tokens=max(contexts),
    )
    pages = max(contexts) // PAGE_SIZE + 1
    table = (torch.randperm(len(rows) * pages, device=DEVICE) + 1).view(len(rows), pages).int()
    kv_shape = (len(rows) * pages + 1, PAGE_SIZE, num_kv_heads, head_dim)
    k, v = (torch.randn(kv_shape, dtype=spec.dtype, device=DEVICE) for _ in range(2))
    batch = SequenceBatch(
        rows,
        contexts,
        torch.tensor(list(accumulate(rows, initial=0)), dtype=torch.int32, device=DEVICE),
        torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        table,
    )
    q = torch.randn(sum(rows), num_heads, head_dim, dtype=spec.dtype, device=DEVICE)
    return build(NoOptions(), spec), batch, LayerKV(k, v), q


def time_step(shape: tuple[int, int, int], rows: list[int], contexts: list[int]) -> float:
    backend, batch, kv, q = make(shape, rows, contexts)
    plan, out = backend.plan(batch), torch.empty_like(q)
    return microseconds(lambda: backend.forward(plan, kv, q, out))


def time_fused(shape: tuple[int, int, int], sequences: int, rows: int) -> float:
    """torch's fused attention over the same sizes, without a cached prefix."""
    num_heads, num_kv_heads, head_dim = shape

    def normal(heads: int) -> torch.Tensor:
        size = (sequences, heads, rows, head_dim)
        return torch.randn(size, dtype=torch.bfloat16, device=DEVICE)

    q, k, v = normal(num_heads), normal(num_kv_heads), normal(num_kv_heads)
    return microseconds(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )


def main() -> None:
    bandwidth = copy_bandwidth()
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_s": round(bandwidth),
    }
    for name, shape in SHAPES.items():
        for sequences, context in ((1, 160), (1, 8192), (1, 131072), (16, 1024), (64, 4096)):
            us = time_step(shape, [1] * sequences, [context] * sequences)
            kv_bytes = 2 * 2 * sequences * context * shape[1] * shape[2]
            report[f"{name}.decode.{sequences}x{context}"] = {
                "us": round(us, 1),
                "ratio_to_bandwidth": round(kv_bytes / bandwidth / (us * 1e-6), 3),
            }
        for sequences, rows in ((1, 128), (1, 2048), (1, 8192), (4, 2048)):
            us = time_step(shape, [rows] * sequences, [rows] * sequences)
            report[f"{name}.prefill.{sequences}x{rows}"] = {
                "us": round(us, 1),
                "ratio_to_torch": round(time_fused(shape, sequences, rows) / us, 3),
            }
        us = time_step(shape, [512], [8192])
        report[f"{name}.prefill.512 after 7680"] = {"us": round(us, 1)}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
