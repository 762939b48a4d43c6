"""Times mixtures of experts of few rows on a GPU, from routes to sums, and prints JSON.

    python -m benchmarks.gpu_routed_experts --rows 2 8 16

One launch of all (core.kernels.gluon_experts, for Hopper) beside the separate ones: grouping, two
products, sums. A row of the table in core/kernels/tuned/moe_bf16.json for which the former is
faster says "stream": true. A time is that of one layer in one CUDA graph over several routings at
random, so that few weights are found in the cache; weights are counted once for each expert that
has rows. Shape legend: T rows, K choices, L experts, E hidden size, I middle size.
"""

import argparse
import importlib
import json
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_linear import microseconds
from benchmarks.gpu_moe_tiles import SHAPES, Shape
from core.kernels.triton_moe_bf16 import PlainExperts, StreamKernel
from core.kernels.triton_moe_groups import group_into_tiles
from core.kernels.triton_moe_permute import sum_results

_ROUTINGS = 4  # of one graph
_ROUTE = tuple[Tensor, Tensor]


def weights_of(shape: Shape) -> tuple[Tensor, Tensor]:
    """((L, 2 I, E), (L, E, I)) bfloat16."""
    sizes = (2 * shape.middle, shape.hidden), (shape.hidden, shape.middle)
    gate_up, down = (
        torch.randn((shape.num_experts, *size), dtype=torch.bfloat16, device="cuda")
        * size[1] ** -0.5
        for size in sizes
    )
    return gate_up, down


def routes_of(shape: Shape, rows: int) -> list[_ROUTE]:
    """(experts (T, K), weights (T, K)) of each routing."""
    ids = [
        torch.rand((rows, shape.num_experts), device="cuda").topk(shape.top_k, 1).indices
        for _ in range(_ROUTINGS)
    ]
    return [(each, torch.rand(each.shape, device="cuda")) for each in ids]


def launches(
    shape: Shape, products: PlainExperts, x_TE: Tensor, experts_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """As core.kernels.triton_moe does it where the table doesn't say "stream"."""
    block_M = products.block_M(experts_TK.numel(), shape.num_experts)
    groups = group_into_tiles(experts_TK, shape.num_experts, block_M)
    rows = products.routed_rows(x_TE, groups.source_P)
    results_PE = x_TE.new_empty((rows.num_places, x_TE.shape[1]))
    products.down(products.gate_up(rows, groups.tiles), groups.tiles, results_PE)
    return sum_results(results_PE, groups.positions_TK, weights_TK, torch.empty_like(x_TE))


def time_rows(
    shape: Shape, rows: int, products: PlainExperts, streamed: StreamKernel
) -> dict[str, Any]:
    routes = routes_of(shape, rows)
    x_TE = torch.randn((rows, shape.hidden), dtype=torch.bfloat16, device="cuda")
    separate, stream = partial(launches, shape, products, x_TE), partial(streamed, x_TE)
    results = [run(*routes[0]).double() for run in (separate, stream)]
    error = float((results[0] - results[1]).norm() / results[0].norm())
    assert error < 1e-2, f"the two differ by {error}"
    touched = statistics.mean(int(ids.unique().numel()) for ids, _ in routes)
    weight_bytes = 2 * 3 * shape.hidden * shape.middle * touched
    us = microseconds([partial(separate, *each) for each in routes])
    stream_us = microseconds([partial(stream, *each) for each in routes])
    return {
        "rows": rows,
        "separate_us": round(us, 2),
        "stream_us": round(stream_us, 2),
        "of_separate": round(us / stream_us, 3),
        "stream_tb_s": round(weight_bytes / stream_us / 1e6, 3),
        "difference": round(error, 5),
    }


def main() -> None:
    plain = [name for name, shape in SHAPES.items() if not shape.fp8]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--shape", default=plain[0], choices=plain)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    gate_up, down = weights_of(shape)
    streamed = importlib.import_module("core.kernels.gluon_experts").StreamedExperts(gate_up, down)
    products = PlainExperts(gate_up, down, torch.bfloat16)
    results = [time_rows(shape, rows, products, streamed) for rows in args.rows]
    device = torch.cuda.get_device_name()
    print(json.dumps({"device": device, "shape": args.shape, "results": results}))


if __name__ == "__main__":
    main()
