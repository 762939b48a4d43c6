"""Times linear layers of fp8 blocks on a GPU, and prints JSON.

    python -m benchmarks.gpu_fp8_linear                        # what the table chooses
    python -m benchmarks.gpu_fp8_linear --sweep --write DIR    # measures what goes in it
    python -m benchmarks.gpu_fp8_linear --table DIR/sweep.json # puts it there

A time is that of one layer in one CUDA graph over copies of it, so that no weight is found in the
cache and the start of a kernel overlaps the end of the one before, as in a model's step. It covers
quantising the rows, and silu_and_mul where the layer is gated. The floor is the larger of reading
the weight at 3.35 TB/s and multiplying at 1,979 TFLOP/s, an H100's figures. Candidates compile in
as many processes as there are CPUs.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_linear import microseconds
from core.devices.cuda.linear import triton_fp8
from core.devices.cuda.triton_ops import TritonOps
from core.gpu_tools import tuning
from core.interfaces.ops import LinearKernel
from core.interfaces.weights import BlockFp8
from core.ops.block_fp8 import dequantize, num_blocks

Tile = dict[str, Any]
# name: (outputs, inputs, gated), those of DeepSeek-V3
SHAPES = {
    "q_a_kv_a": (2112, 7168, 0),
    "o_proj": (7168, 16384, 0),
    "q_b": (24576, 1536, 0),
    "shared_up": (4096, 7168, 1),
    "shared_down": (7168, 2048, 0),
    "dense_up": (36864, 7168, 1),
    "dense_down": (7168, 18432, 0),
    "q_b_16": (3072, 1536, 0),
}
ROWS = (1, 8, 32, 64, 128, 256, 1024, 4096, 8192)
_BYTES_OF_COPIES = 400 << 20  # eight times the cache
_BYTES_A_SECOND, _FLOPS = 3.35e12, 1979e12
_KEYS = ("BLOCK_T", "BLOCK_O", "QUANTIZED", "TURNED", "PREFETCH_I", "num_warps", "num_stages")
# By the most rows a tile has; splits come from the shape.
_TILES: dict[int, list[tuple[int, ...]]] = {
    16: [
        (16, 64, 0, 1, 1024, 4, 6),
        (16, 64, 0, 1, 0, 4, 4),
        (16, 128, 0, 1, 512, 4, 4),
        (16, 128, 0, 1, 0, 8, 5),
        (16, 64, 1, 1, 1024, 4, 6),
        (16, 32, 0, 0, 1024, 4, 6),
    ],
    32: [
        (32, 64, 0, 1, 512, 4, 5),
        (32, 64, 1, 1, 512, 4, 5),
        (32, 64, 1, 1, 0, 4, 6),
        (32, 128, 1, 1, 512, 4, 4),
        (32, 128, 1, 1, 0, 4, 5),
        (32, 128, 1, 1, 0, 8, 6),
    ],
    64: [
        (64, 64, 1, 0, 0, 4, 5),
        (64, 64, 1, 1, 0, 4, 6),
        (64, 128, 1, 1, 0, 4, 4),
        (64, 128, 1, 1, 0, 8, 5),
        (64, 64, 0, 1, 0, 4, 4),
    ],
    128: [
        (64, 64, 1, 0, 0, 4, 5),
        (128, 64, 1, 0, 0, 4, 4),
        (128, 128, 1, 0, 0, 8, 4),
        (64, 128, 1, 1, 0, 4, 4),
    ],
    256: [(128, 64, 1, 0, 0, 4, 4), (128, 128, 1, 0, 0, 8, 3), (128, 128, 1, 0, 0, 8, 4)],
}


def _splits(size_O: int, size_I: int, block_O: int, row_blocks: int) -> list[int]:
    """1, and those that make about one, two or three programs for each of 132 processors."""
    tiles = -(-size_O // block_O) * row_blocks
    wanted = {max(1, round(132 * waves / tiles)) for waves in (1, 2, 3)}
    return sorted(split for split in wanted if num_blocks(size_I) >= 2 * split)[:3]


def candidates(name: str, rows: int) -> Iterator[Tile]:
    size_O, size_I, gated = SHAPES[name]
    class_rows = next((most for most in _TILES if rows <= most), 256)
    for values in _TILES[class_rows]:
        tile = {"path": "tiles", "max_rows": rows, **dict(zip(_KEYS, values, strict=True))}
        row_blocks = -(-rows // tile["BLOCK_T"])
        for split in _splits(size_O, size_I, tile["BLOCK_O"], row_blocks):
            yield {**tile, "SPLIT": split}
        if gated and rows >= 128:
            yield {**tile, "SPLIT": 1, "APART": True}
    if rows >= 32:
        yield {"path": "vendor", "max_rows": rows}


def kernel_of(weight: BlockFp8, gated: int, tile: Tile) -> LinearKernel:
    return triton_fp8.prepare(weight, None, TritonOps().silu_and_mul if gated else None, tile)


def copies_of(name: str) -> list[BlockFp8]:
    size_O, size_I, _ = SHAPES[name]
    copies = max(2, _BYTES_OF_COPIES // (size_O * size_I))
    values = torch.randint(0, 256, (copies, size_O, size_I), dtype=torch.uint8, device="cuda")
    values = values.bitwise_and_(0xBF).view(torch.float8_e4m3fn)  # below 2, no NaN
    shape = (copies, num_blocks(size_O), num_blocks(size_I))
    scales = torch.rand(shape, device="cuda") + 0.5
    return [BlockFp8(*each) for each in zip(values, scales, strict=True)]


def compile_one(job: tuple[str, int, Tile]) -> None:
    """Put a candidate in the compiler's cache on disk."""
    name, rows, tile = job
    size_O, size_I, gated = SHAPES[name]
    values = torch.empty((size_O, size_I), dtype=torch.float8_e4m3fn, device="cuda")
    scales = torch.ones((num_blocks(size_O), num_blocks(size_I)), device="cuda")
    x = torch.zeros((rows, size_I), dtype=torch.bfloat16, device="cuda")
    try:
        kernel_of(BlockFp8(values, scales), gated, tile)(x)
    except Exception as error:  # too large for the device: the sweep says so
        print("compiling", name, tile, repr(error)[:160], file=sys.stderr)


def compile_all(names: list[str], all_rows: list[int]) -> None:
    jobs = [
        (name, rows, tile)
        for name in names
        for rows in all_rows
        for tile in candidates(name, rows)
        if tile["path"] == "tiles"
    ]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs, chunksize=4))


def oracle(weight: BlockFp8, x_TI: Tensor, gated: int) -> Tensor:
    """From what fp8 leaves of the rows, in float32."""
    values, scales = triton_fp8.quantize_rows(x_TI)
    wide_TI = values.float() * scales.repeat_interleave(128, 1)[:, : x_TI.shape[1]]
    out_TO = wide_TI @ dequantize(weight, torch.float32).T
    return TritonOps().silu_and_mul(out_TO) if gated else out_TO


def check(kernel: LinearKernel, x_TI: Tensor, right: Tensor) -> None:
    result, again = kernel(x_TI), kernel(x_TI)
    error = ((result.float() - right).norm() / right.norm()).item()
    assert error < 1e-2, f"error {error}"
    assert torch.equal(result, again), "two runs differ"


def row_of(name: str, rows: int, us: float, tile: Tile) -> dict[str, Any]:
    size_O, size_I, _ = SHAPES[name]
    floor_us = 1e6 * max(size_O * size_I / _BYTES_A_SECOND, 2 * rows * size_O * size_I / _FLOPS)
    return {
        "device": tuning.table_of(torch.device("cuda")),
        "shape": name,
        "rows": rows,
        "us": round(us, 2),
        "tb_s": round(size_O * size_I / us / 1e6, 3),
        "tflop_s": round(2 * rows * size_O * size_I / us / 1e6, 1),
        "of_floor": round(floor_us / us, 3),
        "tile": tile,
    }


def time_tile(name: str, rows: int, weights: list[BlockFp8], tile: Tile) -> dict[str, Any]:
    gated = SHAPES[name][2]
    x = torch.randn((rows, SHAPES[name][1]), dtype=torch.bfloat16, device="cuda")
    kernels = [kernel_of(weight, gated, tile) for weight in weights]
    return row_of(name, rows, microseconds([partial(kernel, x) for kernel in kernels]), tile)


def sweep_cell(name: str, rows: int, weights: list[BlockFp8]) -> list[dict[str, Any]]:
    """Every candidate of a shape and a number of rows, the fastest first."""
    size_I, gated = SHAPES[name][1:]
    x = torch.randn((rows, size_I), dtype=torch.bfloat16, device="cuda")
    right = oracle(weights[0], x, gated)
    few = weights if rows <= 128 else weights[:4]
    results = []
    for tile in candidates(name, rows):
        try:
            check(kernel_of(weights[0], gated, tile), x, right)
            results.append(time_tile(name, rows, few, tile))
        except Exception as error:  # one candidate that doesn't fit must not end the sweep
            print("FAILED", name, rows, tile, repr(error)[:200], flush=True)
    return sorted(results, key=lambda result: float(result["us"]))


def sweep(names: list[str], all_rows: list[int], folder: Path, until_s: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    compile_all(names, all_rows)
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    gc.freeze()  # each capture of a graph collects garbage
    everything: list[dict[str, Any]] = []
    for name in names:
        weights = copies_of(name)
        for rows in all_rows:
            if time.monotonic() - started > until_s:
                return
            results = sweep_cell(name, rows, weights)
            everything += results
            best = [
                f"{each['us']} {each['of_floor']} {list(each['tile'].values())[2:]}"
                for path in ("tiles", "vendor")
                for each in [each for each in results if each["tile"]["path"] == path][:1]
            ]
            print(name, rows, *best, sep=" | ", flush=True)
            (folder / "sweep.json").write_text(json.dumps(everything))
        del weights


def write_table(sweeps: list[Path]) -> None:
    """Put the fastest of each shape and number of rows in the table; of shapes that a device's
    sweeps speak of its other rows go."""
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for result in (each for file in sweeps for each in json.loads(file.read_text())):
        cell = (result["device"], result["shape"], result["rows"])
        if cell not in best or result["us"] < best[cell]["us"]:
            best[cell] = result
    largest = {(device, name): 0 for device, name, _ in best}
    for device, name, rows in best:
        largest[device, name] = max(largest[device, name], rows)
    found = []
    for (device, name, rows), result in best.items():
        size_O, size_I, gated = SHAPES[name]
        shape = {"device": device, "outputs": size_O, "inputs": size_I, "gated": gated}
        # The fastest for the largest number measured is taken for all above.
        endless = rows == largest[device, name] and rows >= 1024
        most = triton_fp8.ANY_ROWS if endless else rows
        found.append({**shape, **result["tile"], "max_rows": most, "us": result["us"]})
    swept = {_shape_of(row) for row in found}
    file = tuning.FOLDER / "linear_fp8.json"
    found += [row for row in json.loads(file.read_text()) if _shape_of(row) not in swept]
    found.sort(key=lambda row: (*_shape_of(row), row["max_rows"]))
    file.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in found) + "\n]\n")


def _shape_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("device", "outputs", "inputs", "gated"))


def report(names: list[str], all_rows: list[int]) -> list[dict[str, Any]]:
    """What the table chooses."""
    results = []
    for name in names:
        weights, gated = copies_of(name), SHAPES[name][2]
        device = weights[0].values_OI.device
        for rows in all_rows:
            found = triton_fp8.measured(device, *SHAPES[name][:2], bool(gated))
            tile = next(dict(tile) for tile in found if rows <= tile["max_rows"])
            results.append(time_tile(name, rows, weights, tile))
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--table", type=Path, nargs="+", help="sweep.json files to take in")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--write", type=Path, help="folder for sweep.json", default=Path())
    parser.add_argument("--until", type=float, default=1e9, help="seconds to begin cells in")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.table:
        write_table(args.table)
    elif args.sweep:
        sweep(args.shapes, args.rows, args.write, args.until)
    else:
        print(json.dumps(report(args.shapes, args.rows), indent=1))


if __name__ == "__main__":
    main()
