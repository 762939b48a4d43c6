"""Times the grouped products of a mixture of experts on a GPU, and prints JSON.

    python -m benchmarks.gpu_moe                                  # the table's choices
    python -m benchmarks.gpu_moe --sweep --rows 1 64 --write DIR  # measures what goes in it
    python -m benchmarks.gpu_moe --tables DIR/sweep.json          # puts it there

Each row is routed to `top_k` different experts drawn at random. A time is that of one layer in one
CUDA graph over several routings, so that few weights are found in the cache; weights are counted
once for each expert that has rows. The peer is torch's grouped GEMM, with silu_and_mul between its
two products. Candidates compile in as many processes as there are CPUs. Shape legend: T rows, P
pairs of row and expert, L experts, E hidden size, I middle size.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_linear import microseconds
from core.kernels import triton_moe_bf16
from core.kernels.expert_tiles import ExpertRows, ExpertTiles
from core.kernels.triton_expert_tiles import cut_into_tiles
from core.kernels.triton_moe_bf16 import PlainExperts, ProductTile, multiply
from core.kernels.triton_ops import TritonOps

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
_ROUTINGS = 4  # of one graph


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer's experts."""

    num_experts: int
    hidden: int
    middle: int
    top_k: int


SHAPES = {"qwen3_30b_a3b": Shape(128, 2048, 768, 8)}

# (weight's rows and inputs of a step, warps, stages, swapped, programs of a processor)
_Values = tuple[int, int, int, int, bool, int]
_FEW: dict[bool, list[_Values]] = {
    True: [
        (32, 128, 4, 4, False, 0),
        (32, 256, 4, 3, False, 0),
        (64, 64, 4, 4, False, 0),
        (64, 128, 4, 3, False, 2),
        (64, 128, 4, 3, True, 2),
        (64, 64, 4, 5, True, 2),
        (64, 64, 4, 5, True, 0),
    ],
    False: [
        (32, 256, 4, 4, False, 0),
        (64, 128, 4, 4, False, 0),
        (128, 64, 4, 4, False, 2),
        (64, 128, 4, 5, True, 2),
        (128, 64, 4, 5, True, 2),
        (64, 256, 4, 3, True, 2),
        (128, 128, 8, 3, True, 1),
    ],
}
_MANY: dict[bool, list[_Values]] = {
    True: [
        (64, 64, 4, 4, False, 2),
        (128, 64, 8, 3, False, 1),
        (128, 64, 8, 4, False, 0),
        (64, 64, 8, 4, False, 0),
    ],
    False: [
        (128, 64, 4, 4, False, 2),
        (128, 64, 8, 4, False, 1),
        (256, 64, 8, 3, False, 1),
        (256, 64, 8, 3, False, 0),
        (128, 128, 8, 3, False, 1),
    ],
}


def candidates(pairs_of_expert: float) -> Iterator[tuple[int, bool, ProductTile]]:
    """(rows of a tile, gated, tile)."""
    if pairs_of_expert <= 8:
        blocks = [16]
    elif pairs_of_expert <= 32:
        blocks = [16, 32, 64]
    else:
        blocks = [64, 128]
    for block_M in blocks:
        tiles = _FEW if block_M <= 32 else _MANY
        for gated in (True, False):
            for values in tiles[gated]:
                yield block_M, gated, ProductTile(*values)


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of one layer with several routings."""

    counts: list[Tensor]  # int64 (L,) of each routing
    x_PE: Tensor  # sorted by expert
    touched: float  # experts that have rows, on average


def case_of(shape: Shape, rows: int) -> Case:
    counts = []
    for _ in range(_ROUTINGS):
        ids_TX = torch.rand((rows, shape.num_experts), device="cuda").topk(shape.top_k, 1).indices
        counts.append(torch.bincount(ids_TX.flatten(), minlength=shape.num_experts))
    x = torch.randn((rows * shape.top_k, shape.hidden), dtype=torch.bfloat16, device="cuda")
    touched = statistics.mean(int((each > 0).sum()) for each in counts)
    return Case(counts, x, touched)


def weights_of(shape: Shape, num_experts: int) -> tuple[Tensor, Tensor]:
    """((L, 2 I, E), (L, E, I))."""
    sizes = (2 * shape.middle, shape.hidden), (shape.hidden, shape.middle)
    gate_up, down = (
        torch.empty((num_experts, *size), dtype=torch.bfloat16, device="cuda") for size in sizes
    )
    return gate_up.normal_(std=shape.hidden**-0.5), down.normal_(std=shape.middle**-0.5)


def grouped_mm(x: Tensor, weight_LND: Tensor, counts_L: Tensor) -> Tensor:
    offsets = counts_L.cumsum(0).to(torch.int32)
    return torch._grouped_mm(x, weight_LND.transpose(1, 2), offs=offsets)


def vendor(x_PE: Tensor, gate_up: Tensor, down: Tensor, counts_L: Tensor) -> Tensor:
    """The same layer by torch."""
    middle = TritonOps().silu_and_mul(grouped_mm(x_PE, gate_up, counts_L))
    return grouped_mm(middle, down, counts_L)


def error_of(result: Tensor, right: Tensor) -> float:
    return float((result.double() - right.double()).norm() / right.double().norm())


def tiles_of(case: Case, block_M: int) -> list[ExpertTiles]:
    places = case.x_PE.shape[0]
    return [cut_into_tiles(counts, places, None, block_M) for counts in case.counts]


def sweep_cell(shape: Shape, rows: int, weights: tuple[Tensor, Tensor]) -> list[dict[str, Any]]:
    """Every candidate of a number of rows, the fastest first."""
    case, results = case_of(shape, rows), []
    pairs = rows * shape.top_k
    middle = torch.randn((pairs, shape.middle), dtype=torch.bfloat16, device="cuda")
    right = {
        True: TritonOps().silu_and_mul(grouped_mm(case.x_PE, weights[0], case.counts[0])),
        False: grouped_mm(middle, weights[1], case.counts[0]),
    }
    for block_M, gated, tile in candidates(pairs / shape.num_experts):
        x, weight = (case.x_PE, weights[0]) if gated else (middle, weights[1])
        out = torch.zeros_like(right[gated])
        all_tiles = tiles_of(case, block_M)
        try:
            multiply(x, None, weight, out, all_tiles[0], tile, gated=gated)
            error = error_of(out, right[gated])
            assert error < 1e-2, f"error {error}"
            runs: list[Callable[[], object]] = [
                partial(multiply, x, None, weight, out, tiles, tile, gated=gated)
                for tiles in all_tiles
            ]
            us = microseconds(runs)
        except Exception as error:  # one candidate that doesn't fit must not end the sweep
            print("FAILED", rows, block_M, gated, tile, repr(error)[:300], flush=True)
            continue
        results.append({"gated": gated, "us": us, "BLOCK_M": block_M, "tile": asdict(tile)})
    return sorted(results, key=lambda result: float(result["us"]))


def vendor_us(shape: Shape, rows: int, weights: tuple[Tensor, Tensor]) -> tuple[Case, float]:
    case = case_of(shape, rows)
    return case, microseconds(
        [partial(vendor, case.x_PE, *weights, counts) for counts in case.counts]
    )


def best_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The tile of rows for which both products together are fastest, and theirs."""
    choices = []
    for block_M in {result["BLOCK_M"] for result in results}:
        first, second = (
            next((r for r in results if r["BLOCK_M"] == block_M and r["gated"] is gated), None)
            for gated in (True, False)
        )
        if first is not None and second is not None:
            choices.append((first["us"] + second["us"], block_M, first, second))
    _, block_M, first, second = min(choices, key=lambda choice: float(choice[0]))
    return {
        "BLOCK_M": block_M,
        "gate_up": first["tile"],
        "down": second["tile"],
        "gate_up_us": round(first["us"], 2),
        "down_us": round(second["us"], 2),
    }


def figures(shape: Shape, case: Case, us: float) -> dict[str, float]:
    """TB/s of the weights of experts with rows, and TFLOP/s."""
    weight_bytes = 2 * 3 * shape.hidden * shape.middle * case.touched
    flop = 6 * case.x_PE.shape[0] * shape.hidden * shape.middle
    return {"tb_s": round(weight_bytes / us / 1e6, 3), "tflop_s": round(flop / us / 1e6, 1)}


def compile_share(share: int, of: int, shape: Shape, all_rows: list[int]) -> None:
    """Put this process's candidates in the compiler's cache on disk."""
    jobs = {job for rows in all_rows for job in candidates(rows * shape.top_k / shape.num_experts)}
    weights = weights_of(shape, 2)
    counts = torch.full((2,), 8, device="cuda")
    for block_M, gated, tile in sorted(jobs, key=repr)[share::of]:
        weight = weights[0 if gated else 1]
        size = shape.middle if gated else shape.hidden
        x = torch.zeros((16, weight.shape[2]), dtype=torch.bfloat16, device="cuda")
        out = torch.empty((16, size), dtype=torch.bfloat16, device="cuda")
        try:
            multiply(
                x, None, weight, out, cut_into_tiles(counts, 16, None, block_M), tile, gated=gated
            )
        except Exception as error:  # too large for the device: the sweep says so
            print("compiling", block_M, tile, repr(error)[:200], file=sys.stderr)


def compile_all(shape: Shape, all_rows: list[int]) -> None:
    spawn = multiprocessing.get_context("spawn")
    of = max(1, (os.cpu_count() or 2) - 1)
    workers = [
        spawn.Process(target=compile_share, args=(share, of, shape, all_rows))
        for share in range(of)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def sweep(name: str, all_rows: list[int], folder: Path | None) -> None:
    shape, table = SHAPES[name], []
    compile_all(shape, all_rows)
    weights = weights_of(shape, shape.num_experts)
    for rows in all_rows:
        results = sweep_cell(shape, rows, weights)
        case, peer_us = vendor_us(shape, rows, weights)
        best = best_of(results)
        us = best["gate_up_us"] + best["down_us"]
        for gated in (True, False):
            top = [result for result in results if result["gated"] is gated][:3]
            shown = [f"{r['us']:.1f} {r['BLOCK_M']} {list(r['tile'].values())}" for r in top]
            print("  ", "gate_up" if gated else "down", *shown, sep=" | ")
        print(name, rows, round(us, 1), figures(shape, case, us), "torch", round(peer_us, 1))
        sys.stdout.flush()
        table.append(
            {
                "device": "H100",
                "experts": shape.num_experts,
                "hidden": shape.hidden,
                "middle": shape.middle,
                "value_bytes": 2,
                "max_rows": rows * shape.top_k,
                **best,
                "vendor_us": round(peer_us, 2),
            }
        )
        if folder:
            (folder / "sweep.json").write_text(json.dumps(table))


def write_table(sweeps: list[Path]) -> None:
    """Put a sweep's rows in core/kernels/tuned; rows that it does not speak of stay."""
    keys = ("device", "experts", "hidden", "middle", "value_bytes", "max_rows")
    file = Path(triton_moe_bf16.__file__).parent / "tuned" / "moe_bf16.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    rows += [row for path in sweeps for row in json.loads(path.read_text())]
    found = {tuple(row[key] for key in keys): row for row in rows}
    lines = ",\n".join("  " + json.dumps(found[cell]) for cell in sorted(found))
    file.write_text(f"[\n{lines}\n]\n")


def time_shape(name: str, all_rows: list[int]) -> list[dict[str, Any]]:
    """What the table chooses, with the cutting into tiles."""
    shape, results = SHAPES[name], []
    weights = weights_of(shape, shape.num_experts)
    experts = PlainExperts(*weights, torch.bfloat16)
    for rows in all_rows:
        case, peer_us = vendor_us(shape, rows, weights)

        def run(counts_L: Tensor, x_PE: Tensor = case.x_PE) -> Tensor:
            places = x_PE.shape[0]
            block_M = experts.block_M(places, shape.num_experts)
            tiles = cut_into_tiles(counts_L, places, None, block_M)
            middle = experts.gate_up(ExpertRows(x_PE, None, None, places), tiles)
            out_PE = torch.empty_like(x_PE)
            experts.down(middle, tiles, out_PE)
            return out_PE

        error = error_of(run(case.counts[0]), vendor(case.x_PE, *weights, case.counts[0]))
        us = microseconds([partial(run, counts) for counts in case.counts])
        times = {"us": round(us, 2), "vendor_us": round(peer_us, 2)}
        ratio = {"of_vendor": round(peer_us / us, 3), "error_to_vendor": round(error, 5)}
        results.append({"shape": name, "rows": rows, **times, **figures(shape, case, us), **ratio})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tables", type=Path, nargs="+", help="sweep.json files to take in")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shape", default="qwen3_30b_a3b", choices=list(SHAPES))
    parser.add_argument("--write", type=Path, help="folder for sweep.json")
    args = parser.parse_args()
    if args.tables:
        write_table(args.tables)
    elif args.sweep:
        sweep(args.shape, args.rows, args.write)
    else:
        device = torch.cuda.get_device_name()
        print(json.dumps({"device": device, "results": time_shape(args.shape, args.rows)}))


if __name__ == "__main__":
    main()
