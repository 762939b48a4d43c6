"""Times the grouped products of a mixture of experts on a GPU, and prints JSON.

    python -m benchmarks.gpu_moe                                  # the table's choices
    python -m benchmarks.gpu_moe --sweep --rows 1 64 --write DIR  # measures what goes in it
    python -m benchmarks.gpu_moe --tables DIR/sweep.json          # puts it there

Each row is routed to `top_k` different experts drawn at random. A time is that of one layer in one
CUDA graph over several routings, so that few weights are found in the cache; weights are counted
once for each expert that has rows. The peer of bf16 is torch's grouped GEMM, with silu_and_mul
between its two products; torch has none for fp8 with block scales. Candidates compile in as many
processes as there are CPUs. Shape legend: T rows, P pairs of row and expert, L experts, E hidden
size, I middle size.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_linear import microseconds
from benchmarks.gpu_moe_tiles import SHAPES, Shape, candidates
from core.devices.cuda.experts import triton_moe_bf16, triton_moe_fp8
from core.devices.cuda.experts.triton_expert_tiles import cut_into_tiles
from core.devices.cuda.experts.triton_moe_bf16 import PlainExperts
from core.devices.cuda.experts.triton_moe_fp8 import Fp8Experts
from core.devices.cuda.linear.triton_fp8 import quantize_rows
from core.devices.cuda.triton_ops import TritonOps
from core.gpu_tools import tuning
from core.interfaces.weights import BlockFp8
from core.ops.block_fp8 import FP8, dequantize_rows, num_blocks
from core.ops.expert_tiles import ExpertRows, ExpertTiles, ProductTile

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
_ROUTINGS = 4  # of one graph


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of one layer with several routings."""

    counts: list[Tensor]  # int64 (L,) of each routing
    x: ExpertRows  # sorted by expert
    touched: float  # experts that have rows, on average
    places: float  # pairs that are theirs, on average


def case_of(shape: Shape, rows: int) -> Case:
    counts = []
    for _ in range(_ROUTINGS):
        ids_TX = torch.rand((rows, shape.num_experts), device="cuda").topk(shape.top_k, 1).indices
        counts_X = torch.bincount(ids_TX.flatten(), minlength=shape.num_experts)
        counts.append(counts_X[: shape.num_local])
    x = rows_of(rows * shape.top_k, shape.hidden, shape)
    touched = statistics.mean(int((each > 0).sum()) for each in counts)
    return Case(counts, x, touched, statistics.mean(int(each.sum()) for each in counts))


def rows_of(num_places: int, size: int, shape: Shape) -> ExpertRows:
    """At random, as the first or the second product reads them."""
    values = torch.randn((num_places, size), dtype=torch.bfloat16, device="cuda")
    if not shape.fp8:
        return ExpertRows(values, None, None, num_places)
    return ExpertRows(*quantize_rows(values), None, num_places)


Weight = Tensor | BlockFp8


def weights_of(shape: Shape, num_experts: int) -> tuple[Weight, Weight]:
    """((L, 2 I, E), (L, E, I))."""
    first, second = (2 * shape.middle, shape.hidden), (shape.hidden, shape.middle)
    return weight_of(num_experts, first, shape.fp8), weight_of(num_experts, second, shape.fp8)


def weight_of(num_experts: int, size: tuple[int, int], fp8: bool) -> Weight:
    weight = torch.empty((num_experts, *size), dtype=FP8 if fp8 else torch.bfloat16, device="cuda")
    for matrix in weight:
        matrix.copy_(torch.randn(size, device="cuda") * size[1] ** -0.5)
    if not fp8:
        return weight
    blocks = [num_blocks(length) for length in size]
    return BlockFp8(weight, torch.rand((num_experts, *blocks), device="cuda") + 0.5)


def product(
    shape: Shape, rows: ExpertRows, weight: Weight, gated: bool
) -> tuple[Callable[[ExpertTiles, ProductTile], None], ExpertRows]:
    """(one product, where it puts its result)."""
    size, places = shape.middle if gated else shape.hidden, rows.num_places
    if isinstance(weight, Tensor):
        out = torch.zeros((places, size), dtype=torch.bfloat16, device="cuda")

        def plain(tiles: ExpertTiles, tile: ProductTile) -> None:
            triton_moe_bf16.multiply(rows, weight, out, tiles, tile, gated=gated)

        return plain, ExpertRows(out, None, None, places)
    out = torch.zeros((places, size), dtype=FP8 if gated else torch.bfloat16, device="cuda")
    scales = torch.zeros((places, num_blocks(size)), device="cuda") if gated else None

    def scaled(tiles: ExpertTiles, tile: ProductTile) -> None:
        triton_moe_fp8.multiply(rows, weight, tiles, out, scales, tile)

    return scaled, ExpertRows(out, scales, None, places)


def values_of(rows: ExpertRows) -> Tensor:
    if rows.scales is None:
        return rows.values
    return dequantize_rows(rows.values, rows.scales, torch.float32)


def right_of(
    shape: Shape, rows: ExpertRows, weight: Weight, counts_L: Tensor, gated: bool
) -> Tensor:
    """By torch; of fp8 by the tile that the tests compare with float64."""
    if isinstance(weight, Tensor):
        result = grouped_mm(rows.values, weight, counts_L)
        return TritonOps().silu_and_mul(result) if gated else result
    run, out = product(shape, rows, weight, gated)
    tiles = cut_into_tiles(counts_L, rows.num_places, None, 16)
    run(tiles, triton_moe_fp8.usual_tile(16, gated=gated))
    return values_of(out)


def grouped_mm(x: Tensor, weight_LND: Tensor, counts_L: Tensor) -> Tensor:
    offsets = counts_L.cumsum(0).to(torch.int32)
    return torch._grouped_mm(x, weight_LND.transpose(1, 2), offs=offsets)


def vendor(x_PE: Tensor, gate_up: Tensor, down: Tensor, counts_L: Tensor) -> Tensor:
    """The same layer by torch."""
    middle = TritonOps().silu_and_mul(grouped_mm(x_PE, gate_up, counts_L))
    return grouped_mm(middle, down, counts_L)


def error_of(result: Tensor, right: Tensor) -> float:
    return float((result.double() - right.double()).norm() / right.double().norm())


def sweep_cell(
    shape: Shape, rows: int, weights: tuple[Weight, Weight]
) -> tuple[Case, list[dict[str, Any]]]:
    """Every candidate of a number of rows, the fastest first."""
    case, results = case_of(shape, rows), []
    places = case.x.num_places
    middle = rows_of(places, shape.middle, shape)
    for is_gated in (True, False):
        x, weight = (case.x, weights[0]) if is_gated else (middle, weights[1])
        right = right_of(shape, x, weight, case.counts[0], is_gated)
        run, out = product(shape, x, weight, is_gated)
        held = int(case.counts[0].sum())  # other ranks' pairs are no places here
        for block_M, gated, tile in candidates(shape, rows):
            if gated is not is_gated:
                continue
            tiles = [cut_into_tiles(each, places, None, block_M) for each in case.counts]
            try:
                run(tiles[0], tile)
                error = error_of(values_of(out)[:held], right[:held])
                assert error < (3e-2 if shape.fp8 else 1e-2), f"error {error}"
                us = microseconds([partial(run, each, tile) for each in tiles])
            except Exception as error:  # one candidate that doesn't fit must not end the sweep
                print("FAILED", rows, block_M, gated, tile, repr(error)[:300], flush=True)
                continue
            results.append({"gated": gated, "us": us, "BLOCK_M": block_M, "tile": asdict(tile)})
    return case, sorted(results, key=lambda result: float(result["us"]))


def vendor_us(case: Case, weights: tuple[Weight, Weight]) -> float | None:
    gate_up, down = weights
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor)):
        return None
    return microseconds(
        [partial(vendor, case.x.values, gate_up, down, counts) for counts in case.counts]
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
    weight_bytes = (1 if shape.fp8 else 2) * 3 * shape.hidden * shape.middle * case.touched
    flop = 6 * case.places * shape.hidden * shape.middle
    return {"tb_s": round(weight_bytes / us / 1e6, 3), "tflop_s": round(flop / us / 1e6, 1)}


def compile_share(share: int, of: int, shape: Shape, all_rows: list[int]) -> None:
    """Put this process's candidates in the compiler's cache on disk."""
    jobs = {job for rows in all_rows for job in candidates(shape, rows)}
    weights = weights_of(shape, 2)
    counts = torch.full((2,), 8, device="cuda")
    inputs = [rows_of(16, size, shape) for size in (shape.hidden, shape.middle)]
    for block_M, gated, tile in sorted(jobs, key=repr)[share::of]:
        number = 0 if gated else 1
        run, _ = product(shape, inputs[number], weights[number], gated)
        try:
            run(cut_into_tiles(counts, 16, None, block_M), tile)
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
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    compile_all(shape, all_rows)
    weights = weights_of(shape, shape.num_local)
    for rows in all_rows:
        case, results = sweep_cell(shape, rows, weights)
        peer_us = vendor_us(case, weights)
        best = best_of(results)
        us = best["gate_up_us"] + best["down_us"]
        for gated in (True, False):
            top = [result for result in results if result["gated"] is gated][:3]
            shown = [f"{r['us']:.1f} {r['BLOCK_M']} {list(r['tile'].values())}" for r in top]
            print("  ", "gate_up" if gated else "down", *shown, sep=" | ")
        print(name, rows, round(us, 1), figures(shape, case, us), "torch", peer_us)
        sys.stdout.flush()
        table.append(
            {
                "device": tuning.table_of(torch.device("cuda")),
                "experts": shape.num_local,
                "hidden": shape.hidden,
                "middle": shape.middle,
                "value_bytes": 1 if shape.fp8 else 2,
                "max_rows": rows * shape.top_k,
                **best,
                "vendor_us": peer_us and round(peer_us, 2),
            }
        )
        if folder:
            (folder / "sweep.json").write_text(json.dumps(table))


def write_tables(sweeps: list[Path]) -> None:
    """Put a sweep's rows in core/gpu_tools/tuned; rows that it does not speak of stay."""
    keys = ("device", "experts", "hidden", "middle", "value_bytes", "max_rows")
    measured = [row for path in sweeps for row in json.loads(path.read_text())]
    for operation, value_bytes in (("moe_bf16", 2), ("moe_fp8", 1)):
        file = tuning.FOLDER / f"{operation}.json"
        rows = json.loads(file.read_text()) if file.exists() else []
        rows += [row for row in measured if row["value_bytes"] == value_bytes]
        found = {tuple(row[key] for key in keys): row for row in rows}
        lines = ",\n".join("  " + json.dumps(found[cell]) for cell in sorted(found))
        if found:
            file.write_text(f"[\n{lines}\n]\n")


def experts_of(weights: tuple[Weight, Weight]) -> PlainExperts | Fp8Experts:
    gate_up, down = weights
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        return PlainExperts(gate_up, down, torch.bfloat16)
    assert isinstance(gate_up, BlockFp8)
    assert isinstance(down, BlockFp8)
    return Fp8Experts(gate_up, down)


def time_shape(name: str, all_rows: list[int]) -> list[dict[str, Any]]:
    """What the table chooses, with the cutting into tiles."""
    shape, results = SHAPES[name], []
    weights = weights_of(shape, shape.num_local)
    experts = experts_of(weights)
    for rows in all_rows:
        case = case_of(shape, rows)
        places = case.x.num_places
        out_PE = torch.empty((places, shape.hidden), dtype=torch.bfloat16, device="cuda")

        def run(counts_L: Tensor, x: ExpertRows = case.x, out_PE: Tensor = out_PE) -> None:
            block_M = experts.block_M(x.num_places, shape.num_local)
            tiles = cut_into_tiles(counts_L, x.num_places, None, block_M)
            experts.down(experts.gate_up(x, tiles), tiles, out_PE)

        us, peer_us = microseconds([partial(run, each) for each in case.counts]), None
        row = {"shape": name, "rows": rows, "us": round(us, 2), **figures(shape, case, us)}
        peer_us = vendor_us(case, weights)
        if peer_us is not None:
            row |= {"vendor_us": round(peer_us, 2), "of_vendor": round(peer_us / us, 3)}
        results.append(row)
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
        write_tables(args.tables)
    elif args.sweep:
        sweep(args.shape, args.rows, args.write)
    else:
        device = torch.cuda.get_device_name()
        print(json.dumps({"device": device, "results": time_shape(args.shape, args.rows)}))


if __name__ == "__main__":
    main()
