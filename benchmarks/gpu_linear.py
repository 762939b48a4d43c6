"""Times linear layers of bf16 weights on a GPU against the vendor's GEMM, and prints JSON.

    python -m benchmarks.gpu_linear                                 # the tables' choices
    python -m benchmarks.gpu_linear --tables DIR/sweep.json         # puts it there
    python -m benchmarks.gpu_linear --stack                         # a whole model's at once
    python -m benchmarks.gpu_linear --sweep --rows 1 8 --write DIR  # measures what goes in them

A time is that of one kernel in one CUDA graph over copies of a layer, so that no weight is found
in the cache and the start of a kernel overlaps the end of the one before, as in a model's step.
The vendor's GEMM is torch's, with silu_and_mul after it where the layer is gated. `sum_8b` adds up
the layers of Llama-3.1-8B. Candidates compile in as many processes as there are CPUs. Knows the
kernels' parameters only as `core.devices.cuda.linear.triton_linear` does: rows of a table.
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_linear_tiles import SHAPES, Tile, candidates
from core.devices.cuda.linear import triton_linear
from core.devices.cuda.triton_ops import TritonOps
from core.gpu_tools import tuning
from core.interfaces.ops import LinearKernel

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_BYTES_OF_COPIES = 500 << 20  # ten times the cache
_DTYPES = {"logits": torch.float32, "gate": torch.float32}


def kernel_of(operation: str, weight: Tensor, tile: Tile) -> LinearKernel:
    return triton_linear.prepare(
        weight,
        None,
        gated=operation == "gated_linear",
        dtype=_DTYPES.get(operation),
        tile=tile,
    )


def vendor_of(operation: str, weight: Tensor) -> LinearKernel:
    if operation in ("logits", "gate"):
        return lambda x: torch.mm(x, weight.t(), out_dtype=torch.float32)
    if operation == "gated_linear":
        return lambda x: TritonOps().silu_and_mul(F.linear(x, weight))
    return lambda x: F.linear(x, weight)


def copies_of(size_O: int, size_I: int) -> Tensor:
    copies = max(2, _BYTES_OF_COPIES // (2 * size_O * size_I))
    weights = torch.empty((copies, size_O, size_I), dtype=torch.bfloat16, device="cuda")
    return weights.normal_(std=size_I**-0.5)


def microseconds(runs: list[Callable[[], object]]) -> float:
    """Of one of them, in a graph of all."""
    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    event = partial(torch.cuda.Event, enable_timing=True)
    times: list[float] = []
    for _ in range(7):
        start, end = event(), event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(runs))
    return statistics.median(times)


def compile_share(share: int, of: int, cells: list[tuple[str, int]]) -> None:
    """Put this process's candidates in the compiler's cache on disk."""
    jobs = [
        (SHAPES[name], rows, tile)
        for name, rows in cells
        for tile in candidates(SHAPES[name][0], SHAPES[name][2], rows)
    ]
    for (operation, size_O, size_I, _), rows, tile in jobs[share::of]:
        weight = torch.empty((size_O, size_I), dtype=torch.bfloat16, device="cuda")
        x = torch.empty((rows, size_I), dtype=torch.bfloat16, device="cuda")
        try:
            kernel_of(operation, weight, tile)(x)
        except Exception as error:  # too large for the device: the sweep says so
            print("compiling", tile, repr(error)[:200], file=sys.stderr)


def compile_all(cells: list[tuple[str, int]]) -> None:
    spawn = multiprocessing.get_context("spawn")
    of = max(1, (os.cpu_count() or 2) - 1)
    workers = [spawn.Process(target=compile_share, args=(share, of, cells)) for share in range(of)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def row_of(name: str, rows: int, us: float, vendor_us: float) -> dict[str, Any]:
    _, size_O, size_I, _ = SHAPES[name]
    return {
        "device": tuning.table_of(torch.device("cuda")),
        "shape": name,
        "rows": rows,
        "us": round(us, 2),
        "tb_s": round(2 * size_O * size_I / us / 1e6, 3),
        "tflop_s": round(2 * rows * size_O * size_I / us / 1e6, 1),
        "vendor_us": round(vendor_us, 2),
        "of_vendor": round(vendor_us / us, 3),
    }


def check(operation: str, weight: Tensor, x: Tensor, kernel: LinearKernel) -> None:
    """Near the vendor's result, and the same twice."""
    result, again, right = kernel(x), kernel(x), vendor_of(operation, weight)(x)
    error = ((result.double() - right.double()).norm() / right.double().norm()).item()
    assert error < 1e-2, f"error {error}"
    assert torch.equal(result, again), "two runs differ"


def sweep_cell(name: str, rows: int, weights: Tensor) -> list[dict[str, Any]]:
    """Every candidate of a shape and a number of rows, the fastest first."""
    operation, _, size_I, _ = SHAPES[name]
    x = torch.randn((rows, size_I), dtype=torch.bfloat16, device="cuda")
    vendor_us = microseconds([partial(vendor_of(operation, weight), x) for weight in weights])
    results = [row_of(name, rows, vendor_us, vendor_us) | {"tile": {"path": "vendor"}}]
    for tile in candidates(operation, size_I, rows):
        try:
            check(operation, weights[0], x, kernel_of(operation, weights[0], tile))
            us = microseconds(
                [partial(kernel_of(operation, weight, tile), x) for weight in weights]
            )
        except Exception as error:  # one candidate that doesn't fit must not end the sweep
            print("FAILED", name, rows, tile, repr(error)[:300], flush=True)
            continue
        results.append(row_of(name, rows, us, vendor_us) | {"tile": tile})
    return sorted(results, key=lambda result: float(result["us"]))


def sweep(names: list[str], all_rows: list[int], folder: Path | None) -> None:
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    compile_all([(name, rows) for rows in all_rows for name in names])
    gc.freeze()  # each capture of a graph collects garbage
    everything: list[dict[str, Any]] = []
    for name in names:
        weights = copies_of(*SHAPES[name][1:3])
        for rows in all_rows:
            results = sweep_cell(name, rows, weights)
            everything += results
            best = [
                f"{result['us']} {list(result['tile'].values())[1:]}"
                for path in ("vector", "matrix", "wide")
                for result in [each for each in results if each["tile"]["path"] == path][:1]
            ]
            print(name, rows, "vendor", results[0]["vendor_us"], *best, sep=" | ")
            sys.stdout.flush()
        del weights
        if folder:
            (folder / "sweep.json").write_text(json.dumps(everything))


def write_tables(sweeps: list[Path]) -> None:
    """Put the fastest of each shape and number of rows in core/gpu_tools/tuned; rows of the tables
    that no sweep speaks of stay."""
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for result in (each for sweep in sweeps for each in json.loads(sweep.read_text())):
        cell = (result["device"], result["shape"], result["rows"])
        if cell not in best or result["us"] < best[cell]["us"]:
            best[cell] = result
    for operation in sorted({shape[0] for shape in SHAPES.values()}):
        file = tuning.FOLDER / f"{operation}_bf16.json"
        rows = {_cell(row): row for row in json.loads(file.read_text())} if file.exists() else {}
        for (device, name, num_rows), result in best.items():
            its_operation, size_O, size_I, _ = SHAPES[name]
            if its_operation == operation:
                shape = {"device": device, "outputs": size_O, "inputs": size_I}
                times = {"us": result["us"], "vendor_us": result["vendor_us"]}
                row = {**shape, "max_rows": num_rows, **result["tile"], **times}
                row["max_rows"] = num_rows
                rows[_cell(row)] = row
        lines = ",\n".join("  " + json.dumps(rows[cell]) for cell in sorted(rows))
        file.write_text(f"[\n{lines}\n]\n")


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("device", "outputs", "inputs", "max_rows"))


def time_shape(name: str, all_rows: list[int]) -> list[dict[str, Any]]:
    """What the tables choose for one shape."""
    operation, size_O, size_I, _ = SHAPES[name]
    ops, weights = TritonOps(), copies_of(size_O, size_I)
    make = getattr(ops, operation)
    biases = () if operation in ("logits", "gate") else (None,)
    kernels = [make(weight, *biases) for weight in weights]
    vendors = [vendor_of(operation, weight) for weight in weights]
    results = []
    for rows in all_rows:
        x = torch.randn((rows, size_I), dtype=torch.bfloat16, device="cuda")
        us = microseconds([partial(kernel, x) for kernel in kernels])
        vendor_us = microseconds([partial(kernel, x) for kernel in vendors])
        results.append(row_of(name, rows, us, vendor_us))
    return results


def sums(results: list[dict[str, Any]], all_rows: list[int]) -> list[dict[str, Any]]:
    """Milliseconds of a model's linear layers, for each number of rows."""
    return [
        {
            "rows": rows,
            **{
                f"{key[:-2]}ms": round(
                    sum(
                        result[key] * SHAPES[result["shape"]][3] / 1e3
                        for result in results
                        if result["rows"] == rows
                    ),
                    3,
                )
                for key in ("us", "vendor_us")
            },
        }
        for rows in all_rows
    ]


def time_stack(all_rows: list[int]) -> list[dict[str, Any]]:
    """Milliseconds of all of Llama-3.1-8B but attention and embedding, norms included."""
    ops, names = TritonOps(), ("8b_qkv", "8b_out", "8b_gate_up", "8b_down")
    weights = [[copy_of(*SHAPES[name][1:3]) for name in names] for _ in range(32)]
    head, norm_E = copy_of(*SHAPES["8b_head"][1:3]), torch.ones_like(weights[0][1][0])
    makers = {
        "ms": (ops.linear, ops.gated_linear, ops.logits),
        "vendor_ms": (
            lambda weight, _: vendor_of("linear", weight),
            lambda weight, _: vendor_of("gated_linear", weight),
            lambda weight: vendor_of("logits", weight),
        ),
    }
    results: list[dict[str, Any]] = [{"rows": rows} for rows in all_rows]
    for key, (linear, gated_linear, logits) in makers.items():
        layers = [
            (linear(qkv, None), linear(out, None), gated_linear(up, None), linear(down, None))
            for qkv, out, up, down in weights
        ]
        for result in results:
            x_TE = torch.randn((result["rows"], 4096), dtype=torch.bfloat16, device="cuda")
            run = partial(forward, ops, layers, logits(head), norm_E, x_TE)
            result[key] = round(microseconds([run]) / 1e3, 3)
    return results


def copy_of(size_O: int, size_I: int) -> Tensor:
    weight = torch.empty((size_O, size_I), dtype=torch.bfloat16, device="cuda")
    return weight.normal_(std=size_I**-0.5)


def forward(
    ops: TritonOps,
    layers: list[tuple[LinearKernel, LinearKernel, LinearKernel, LinearKernel]],
    head: LinearKernel,
    norm_E: Tensor,
    x_TE: Tensor,
) -> Tensor:
    residual_TE = x_TE.clone()
    for qkv, out, gate_up, down in layers:
        x_TE, residual_TE = ops.add_rms_norm(x_TE, residual_TE, norm_E, 1e-5)
        x_TE = out(qkv(x_TE)[:, : x_TE.shape[1]])  # as large as attention's result
        x_TE, residual_TE = ops.add_rms_norm(x_TE, residual_TE, norm_E, 1e-5)
        x_TE = down(gate_up(x_TE))
    return head(ops.add_rms_norm(x_TE, residual_TE, norm_E, 1e-5)[0])


def report(names: list[str], all_rows: list[int]) -> dict[str, object]:
    results = [result for name in names for result in time_shape(name, all_rows)]
    return {
        "device": torch.cuda.get_device_name(),
        "stack_8b": time_stack(all_rows),
        "sum_8b": sums(results, all_rows),
        "results": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tables", type=Path, nargs="+", help="sweep.json files to take in")
    parser.add_argument("--stack", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--write", type=Path, help="folder for sweep.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.tables:
        write_tables(args.tables)
    elif args.stack:
        print(json.dumps(time_stack(args.rows)))
    elif args.sweep:
        sweep(args.shapes, args.rows, args.write)
    else:
        print(json.dumps(report(args.shapes, args.rows), indent=1))


if __name__ == "__main__":
    main()
