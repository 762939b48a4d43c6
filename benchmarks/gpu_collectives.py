"""Collectives of the comm plugins over the GPUs of one host, in CUDA graphs.

    python -m benchmarks.gpu_collectives [--ranks 2] [--plugins nccl symm_mem] [--kib 16 256 2048]

Prints a JSON line for each size: microseconds of an all-reduce in bfloat16, of one with the
residual's addition and the norm behind it (rows of `--columns`, as layers ask for it), of a
reduce-scatter of as many bytes, and of an all-gather of a rank's part of them, by plugin, and
NCCL's time over each.
Values are checked: every rank brings another number.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import rank_processes

KIB = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 65536)
_CALLS, _REPLAYS = 20, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--plugins", nargs="+", default=["nccl", "symm_mem"])
    parser.add_argument("--columns", type=int, default=4096, help="of a row that is normalised")
    parser.add_argument("--kib", type=int, nargs="+", default=list(KIB))
    parser.add_argument("--rank", type=int, help="set by the first process")
    parser.add_argument("--folder", help="set by the first process")
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments)
        return
    sys.exit(rank_processes.run("benchmarks.gpu_collectives", arguments.ranks))


def run_rank(arguments: argparse.Namespace) -> None:
    """The same sizes and plugins in the same order on every rank."""
    import torch

    from core.interfaces.comm import connect
    from core.parallel.mesh import open_mesh
    from core.parallel.plan import Plan
    from core.plugin.plugin_manager import PluginManager
    from core.settings.config import PluginChoice

    rank, size = arguments.rank, arguments.ranks
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    plan = Plan(tp_attn=size, tp_expert=size)
    rendezvous = Path(arguments.folder) / "rendezvous"
    mesh = open_mesh(
        plan,
        rank,
        torch_backends={"tp": "nccl"},
        rendezvous=rendezvous,
        timeout_s=60,
        device=device,
    )
    table = PluginManager.load().table("comm")
    comms = {
        name: connect(mesh.groups, {"tp": table.create(PluginChoice(name=name), key="comm")})
        for name in arguments.plugins
    }
    for kib in arguments.kib:
        row: dict[str, Any] = {"kib": kib}
        for name, comm in comms.items():
            tp = comm.axes["tp"]
            row |= times(tp, kib * 1024, device, prefix=name)
            add_norm_us = round(time_of_add_norm(tp, kib * 1024, arguments.columns, device), 2)
            row[f"{name}_add_norm_us"] = add_norm_us
        for name in arguments.plugins[1:]:
            for kind in ("all_reduce", "add_norm", "reduce_scatter", "all_gather"):
                first = row[f"{arguments.plugins[0]}_{kind}_us"]
                row[f"{name}_{kind}_ratio"] = round(first / row[f"{name}_{kind}_us"], 2)
        if rank == 0:
            print(json.dumps(row), flush=True)
    torch.cuda.synchronize()
    mesh.close()


def times(comm: Any, num_bytes: int, device: Any, *, prefix: str) -> dict[str, float]:
    """Microseconds of each collective; asserts what it gives."""
    import torch

    rows, size = num_bytes // 2 // 1024, comm.size
    rows = max(rows // size, 1) * size
    x = torch.full((rows, 1024), float(comm.rank + 1), dtype=torch.bfloat16, device=device)
    part = x[: rows // size].clone()
    total = size * (size + 1) / 2
    assert bool((comm.all_reduce(x.clone()) == total).all()), "all_reduce"
    assert bool((comm.reduce_scatter(x.clone()) == total).all()), "reduce_scatter"
    gathered = comm.all_gather(part, 0).view(size, -1).float().mean(1)
    assert gathered.tolist() == [float(peer + 1) for peer in range(size)], "all_gather"
    x.zero_()  # sums stay what they are
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": partial(comm.all_reduce, x),
        "reduce_scatter": partial(comm.reduce_scatter, x),
        "all_gather": partial(comm.all_gather, part, 0),
    }
    return {f"{prefix}_{kind}_us": round(microseconds(call), 2) for kind, call in calls.items()}


def time_of_add_norm(comm: Any, num_bytes: int, columns: int, device: Any) -> float:
    """Microseconds of what ends a block of a layer; asserts what it gives."""
    import torch

    from core.devices.select import select_ops
    from core.layers.basic.row_exchange import sum_add_norm

    add_norm = sum_add_norm(comm, select_ops(device))
    shape = (max(num_bytes // 2 // columns, 1), columns)
    x = torch.full(shape, float(comm.rank + 1), dtype=torch.bfloat16, device=device)
    residual, weight = torch.full_like(x, 2.0), torch.full_like(x[0], 3.0)
    norm, residual = add_norm(x.clone(), residual, weight, 0.0)
    assert bool((residual == comm.size * (comm.size + 1) / 2 + 2).all()), "residual"
    assert bool((norm == 3).all()), "norm"
    x.zero_()
    return microseconds(lambda: add_norm(x, residual, weight, 1e-5))


def microseconds(call: Callable[[], Any]) -> float:
    """Of one call of several in a graph; the middle of some replays."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(_CALLS):
            call()
        graph.capture_end()
        graph.replay()
        stream.synchronize()
        found = []
        for _ in range(_REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            found.append(begin.elapsed_time(end) * 1e3 / _CALLS)
    return statistics.median(found)


if __name__ == "__main__":
    main()
