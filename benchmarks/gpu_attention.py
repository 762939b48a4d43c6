"""Times the Triton attention backend on a GPU, one layer at a time, and prints JSON.

    python -m benchmarks.gpu_attention
    python -m benchmarks.gpu_attention --sweep  # how decode is best launched: rows of its table
    python -m benchmarks.gpu_attention --sweep --shapes qwen3_30b --sequences 4 8

A cell is what a layer does between two projections: heads prepared and stored, then attention. It
is compared with its floor: in decode the bytes of k and v over the bandwidth of a large copy, in
prefill the multiplications over those a second of a large matrix product. `share` is floor over
time. CUDA graphs, so that launches from Python don't count; caches of several layers where one
layer's would stay in the L2 cache. Knows nothing of models: shapes are those of one layer.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

from core.devices.cuda.triton_ops import TritonOps
from core.gpu_tools import tuning
from core.interfaces.attention import (
    AttentionSpec,
    HeadTransform,
    LayerKV,
    NewKV,
    SequenceBatch,
)
from plugins.attention._triton_heads.backend import TritonBackend
from plugins.attention._triton_heads.decode import DecodeChoice

DEVICE = torch.device("cuda")
PAGE_SIZE = 16
# Query heads, KV heads, head dimension, norms of heads.
Shape = tuple[int, int, int, bool]
SHAPES: dict[str, Shape] = {
    "llama31_8b": (32, 8, 128, False),
    "qwen3_30b": (32, 4, 128, True),
    "smollm2": (9, 3, 64, False),
}
MIXED = [256 + (16384 - 256) * index // 63 for index in range(64)]
DECODE = {
    "1x1k": [1024],
    "8x1k": [1024] * 8,
    "64x1k": [1024] * 64,
    "256x1k": [1024] * 256,
    "64 of 256..16k": MIXED,
    "1x16k": [16384],
}
PREFILL = {
    "1x1k": ([1024], [1024]),
    "16x2k": ([2048] * 16, [2048] * 16),
    "4x8k": ([8192] * 4, [8192] * 4),
    "30 of 100..2k": ([100 + 64 * index for index in range(30)],) * 2,
    "512 after 7680": ([512], [8192]),
}
CACHE_BYTES = 160_000_000  # three times the L2 cache
MOST_LAYERS = 24
SWEPT_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SWEPT_CONTEXT = 1100
# Tokens of a tile, warps, stages, programs of a multiprocessor.
SWEPT = [
    (32, 4, 6, 2),
    (64, 4, 3, 3),
    (64, 4, 5, 2),
    (64, 4, 6, 1),
    (128, 4, 3, 2),
    (128, 4, 4, 1),
    (32, 4, 4, 4),
    (32, 4, 6, 3),
    (32, 4, 8, 2),
    (64, 4, 2, 4),
    (64, 4, 3, 2),
    (64, 4, 4, 2),
    (128, 4, 2, 2),
    (128, 8, 3, 1),
]
# Of few sequences, which have few tiles: as many programs as tiles, all of which fit beside each
# other.
SWEPT_FEW = [
    (32, 4, 3, 4),
    (32, 4, 2, 8),
    (64, 4, 2, 3),
    (64, 4, 2, 5),
    (64, 8, 2, 3),
    (128, 4, 2, 3),
    (128, 8, 2, 2),
    (128, 8, 2, 3),
]
MOST_FEW = 16


def microseconds(run: Callable[[], object]) -> float:
    """Median over replays of a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return 1e3 * float(
        triton.testing.do_bench(graph.replay, warmup=10, rep=60, return_mode="median")
    )


def copy_bandwidth() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (microseconds(lambda: target.copy_(source)) * 1e-6)


def matrix_rate() -> float:
    """Floating-point operations a second of a large matrix product."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * 8192**3 / (microseconds(lambda: F.linear(a, b)) * 1e-6)


def layer(
    shape: Shape, rows: list[int], contexts: list[int], decode: DecodeChoice | None = None
) -> tuple[Callable[[], None], int]:
    """What runs a step's attention in several layers, over permuted pages; and how many."""
    num_heads, num_kv_heads, head_dim, normed = shape
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
    counts = [-(-context // PAGE_SIZE) for context in contexts]
    order = torch.randperm(sum(counts), dtype=torch.int32) + 1
    table_SM = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    for own_M, pages, count in zip(table_SM, order.split(counts), counts, strict=True):
        own_M[:count] = pages
    starts = torch.tensor(list(accumulate(rows, initial=0)), dtype=torch.int32)
    batch = SequenceBatch(
        rows,
        contexts,
        starts.to(DEVICE),
        torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        table_SM.to(DEVICE),
    )
    positions = [torch.arange(end - count, end) for count, end in zip(rows, contexts, strict=True)]
    slots_T = torch.cat(
        [
            table_SM[index, own // PAGE_SIZE].long() * PAGE_SIZE + own % PAGE_SIZE
            for index, own in enumerate(positions)
        ]
    ).to(DEVICE)
    positions_T = torch.cat(positions).to(DEVICE)

    def normal(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=spec.dtype, device=DEVICE).normal_()

    kv_bytes = 2 * 2 * sum(contexts) * num_kv_heads * head_dim
    num_layers = max(1, min(MOST_LAYERS, CACHE_BYTES // kv_bytes))
    pool = (sum(counts) + 1, PAGE_SIZE, num_kv_heads, head_dim)
    caches = [LayerKV(normal(*pool), normal(*pool)) for _ in range(num_layers)]
    qkv_TFD = normal(sum(rows), num_heads + 2 * num_kv_heads, head_dim)
    angles_CF = torch.randn(max(contexts), head_dim // 2, device=DEVICE)
    norms = [normal(head_dim) if normed else None for _ in range(2)]
    table_CD = torch.cat((angles_CF.cos(), angles_CF.sin()), 1)
    heads = HeadTransform(num_kv_heads, table_CD, norms[0], norms[1], 1e-6)
    out_THD = torch.empty_like(qkv_TFD[:, :num_heads].contiguous())
    ops, backend = TritonOps(), TritonBackend(spec, decode)
    plan = backend.plan(batch)

    def run() -> None:
        for kv in caches:
            q_THD, *new = ops.prepare_heads(qkv_TFD, heads, positions_T, kv, slots_T)
            backend.forward(plan, kv, q_THD, out_THD, NewKV(*new))

    return run, num_layers


def time_layer(
    shape: Shape, rows: list[int], contexts: list[int], decode: DecodeChoice | None = None
) -> float:
    run, num_layers = layer(shape, rows, contexts, decode)
    return microseconds(run) / num_layers


def sweep(shape: Shape, sequences: Sequence[int]) -> Iterator[dict[str, object]]:
    """The fastest launch for each number of sequences, as
    core/gpu_tools/tuned/attention_decode.json holds them."""
    num_heads, num_kv_heads, head_dim, _ = shape
    for count in sequences:
        tiles = SWEPT + (SWEPT_FEW if count <= MOST_FEW else [])
        choices = [DecodeChoice(count, *tile[:3], None, tile[3], levels=4) for tile in tiles]
        contexts = [SWEPT_CONTEXT] * count
        time_layer(shape, [1] * count, contexts, choices[0])  # clocks rise
        times = [time_layer(shape, [1] * count, contexts, choice) for choice in choices]
        us, best = min(zip(times, choices, strict=True), key=lambda pair: pair[0])
        yield {
            "device": tuning.table_of(DEVICE),
            "head_dim": head_dim,
            "group": num_heads // num_kv_heads,
            "value_bytes": 2,
            **asdict(best),
            "us": round(us, 1),
            "others_us": [round(other, 1) for other in times],
        }


def write_table(sweeps: Sequence[Path]) -> None:
    """Put a sweep's rows in core/gpu_tools/tuned; of shapes that it speaks of a device's others go.
    Shapes with as many heads of a group and as large ones are the same to the kernel."""

    def shape_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("device", "head_dim", "group", "value_bytes"))

    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in (each for file in sweeps for each in json.loads(file.read_text())):
        del row["others_us"]
        cell = (*shape_of(row), row["max_rows"])
        if cell not in best or row["us"] < best[cell]["us"]:
            best[cell] = row
    swept = {shape_of(row) for row in best.values()}
    file = tuning.FOLDER / "attention_decode.json"
    found = [row for row in json.loads(file.read_text()) if shape_of(row) not in swept]
    found = sorted([*found, *best.values()], key=lambda row: (*shape_of(row), row["max_rows"]))
    file.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in found) + "\n]\n")


def time_fused(shape: Shape, sequences: int, rows: int) -> float:
    """torch's fused attention over the same sizes, without a cached prefix."""
    num_heads, num_kv_heads, head_dim, _ = shape

    def normal(heads: int) -> torch.Tensor:
        size = (sequences, heads, rows, head_dim)
        return torch.randn(size, dtype=torch.bfloat16, device=DEVICE)

    q, k, v = normal(num_heads), normal(num_kv_heads), normal(num_kv_heads)
    return microseconds(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="launches of decode, by sequences")
    swept = ["llama31_8b", "qwen3_30b"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=swept, help="of the sweep")
    parser.add_argument(
        "--sequences", nargs="+", type=int, default=SWEPT_SEQUENCES, help="of the sweep"
    )
    parser.add_argument("--write", type=Path, help="folder for sweep.json")
    parser.add_argument("--tables", type=Path, nargs="+", help="sweep.json files to take in")
    arguments = parser.parse_args()
    if arguments.tables:
        write_table(arguments.tables)
        return
    if arguments.sweep:
        found = []
        for name in arguments.shapes:
            for row in sweep(SHAPES[name], arguments.sequences):
                print(json.dumps(row), flush=True)
                found.append(row)
                if arguments.write:
                    arguments.write.mkdir(parents=True, exist_ok=True)
                    (arguments.write / "sweep.json").write_text(json.dumps(found))
        return
    bandwidth, rate = copy_bandwidth(), matrix_rate()
    report: dict[str, object] = {
        "device": torch.cuda.get_device_name(),
        "copy_bytes_per_s": round(bandwidth),
        "matrix_flops": round(rate),
    }
    for name, shape in SHAPES.items():
        num_heads, num_kv_heads, head_dim, _ = shape
        for cell, contexts in DECODE.items():
            us = time_layer(shape, [1] * len(contexts), contexts)
            floor_us = 1e6 * 2 * 2 * sum(contexts) * num_kv_heads * head_dim / bandwidth
            report[f"{name}.decode.{cell}"] = {
                "us": round(us, 1),
                "share": round(floor_us / us, 3),
            }
            torch.cuda.empty_cache()
        for cell, (rows, contexts) in PREFILL.items():
            us = time_layer(shape, rows, contexts)
            pairs = sum(r * (c - (r - 1) / 2) for r, c in zip(rows, contexts, strict=True))
            flops = 4 * pairs * num_heads * head_dim
            entry = {
                "us": round(us, 1),
                "tflops": round(flops / us * 1e-6, 1),
                "share": round(flops / rate * 1e6 / us, 3),
            }
            if rows == contexts and len(set(rows)) == 1:
                entry["ratio_to_torch"] = round(time_fused(shape, len(rows), rows[0]) / us, 3)
            report[f"{name}.prefill.{cell}"] = entry
            torch.cuda.empty_cache()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
