"""Times the Triton backend of latent attention on a GPU, one layer at a time, and prints JSON.

    python -m benchmarks.gpu_latent_attention

Absorbed decode is compared with the bytes of the cached vectors over the memory bandwidth of a
large copy, and with the least time of its products at the rate of a large matrix product; expanded
prefill with the latter, without what the expansion itself takes. Ratios near 1 are as good as can
be. Knows nothing of models: shapes are those of one layer of DeepSeek-V3 (128 heads, or 16 of them
at tp 8) and V2-Lite (16).
"""

import json
from itertools import accumulate

import torch

from benchmarks.gpu_attention import DEVICE, copy_bandwidth, microseconds
from core.interfaces.attention import SequenceBatch
from core.interfaces.latent_attention import LatentAttentionSpec
from core.plugin.hookspecs import NoOptions
from plugins.attention._triton_latent.backend import TritonLatentBackend, build

PAGE_SIZE = 64
NOPE, ROPE, VALUE, LATENT = 128, 64, 128, 512
DECODES = ((1, 1024), (1, 8192), (1, 131072), (16, 1024), (64, 4096), (128, 2048), (128, 4096))
PREFILLS = ((1, 0, 2048), (1, 0, 8192), (4, 0, 2048), (1, 28672, 4096))


def product_rate() -> float:
    """Operations a second of a large bfloat16 product."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return float(2 * 8192**3 / (microseconds(lambda: torch.mm(a, b)) * 1e-6))


def make(
    num_heads: int, rows: list[int], contexts: list[int]
) -> tuple[TritonLatentBackend, SequenceBatch, torch.Tensor]:
    """A backend, a batch over permuted pages, and a cache of random values."""
    spec = LatentAttentionSpec(
        num_heads=num_heads,
        nope_dim=NOPE,
        rope_dim=ROPE,
        value_dim=VALUE,
        latent_dim=LATENT,
        scale=(NOPE + ROPE) ** -0.5,
        page_size=PAGE_SIZE,
        dtype=torch.bfloat16,
        device=DEVICE,
        max_context_tokens=max(contexts),
    )
    pages = max(contexts) // PAGE_SIZE + 1
    table = (torch.randperm(len(rows) * pages, device=DEVICE) + 1).view(len(rows), pages).int()
    cache_shape = (len(rows) * pages + 1, PAGE_SIZE, LATENT + ROPE)
    batch = SequenceBatch(
        rows,
        contexts,
        torch.tensor(list(accumulate(rows, initial=0)), dtype=torch.int32, device=DEVICE),
        torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        table,
    )
    return build(NoOptions(), spec), batch, normal(*cache_shape)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def time_absorbed(num_heads: int, sequences: int, context: int) -> float:
    """Microseconds of one layer's decode."""
    backend, batch, cache = make(num_heads, [1] * sequences, [context] * sequences)
    q, out = (normal(sequences, num_heads, LATENT) for _ in range(2))
    q_rope = normal(sequences, num_heads, NOPE + ROPE)[..., NOPE:]
    plan = backend.plan(batch)
    return microseconds(lambda: backend.absorbed(plan, cache, q, q_rope, out))


def time_expanded(num_heads: int, sequences: int, cached: int, rows: int) -> float:
    """Microseconds of one layer's prefill over keys and values that lie ready."""
    backend, batch, cache = make(num_heads, [rows] * sequences, [cached + rows] * sequences)
    q, out = (normal(sequences * rows, num_heads, size) for size in (NOPE + ROPE, VALUE))
    tokens = min(backend.group_tokens, sequences * (cached + rows))
    keys, values = normal(tokens, num_heads, NOPE), normal(tokens, num_heads, VALUE)
    plan = backend.plan(batch)
    return microseconds(
        lambda: backend.expanded(
            plan, cache, q, lambda x: (keys[: x.shape[0]], values[: x.shape[0]]), out
        )
    )


def main() -> None:
    bandwidth, rate = copy_bandwidth(), product_rate()
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_s": round(bandwidth),
        "product_operations_per_s": round(rate),
    }
    for num_heads in (16, 128):
        for sequences, context in DECODES:
            us = time_absorbed(num_heads, sequences, context)
            tokens = sequences * context
            operations = 2 * tokens * num_heads * (2 * LATENT + ROPE)
            report[f"{num_heads} heads.decode.{sequences}x{context}"] = {
                "us": round(us, 1),
                "ratio_to_bandwidth": round(2 * tokens * (LATENT + ROPE) / bandwidth / us * 1e6, 3),
                "ratio_to_products": round(operations / rate / us * 1e6, 3),
            }
        for sequences, cached, rows in PREFILLS:
            us = time_expanded(num_heads, sequences, cached, rows)
            pairs = sequences * (rows * cached + rows * (rows + 1) // 2)
            operations = 2 * pairs * num_heads * (NOPE + ROPE + VALUE)
            report[f"{num_heads} heads.prefill.{sequences}x{rows} after {cached}"] = {
                "us": round(us, 1),
                "ratio_to_products": round(operations / rate / us * 1e6, 3),
            }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
