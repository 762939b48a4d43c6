"""One rank of the comm contract: runs every collective, saves what it got.

    python -m core.testing.comm_rank JOB RANK

JOB is the JSON that `core.testing.comm.run_backend` writes. What the rank brings, and what is
right, is in core.testing.comm.
"""

import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from core.cluster.nodes.missing import missing_ranks
from core.interfaces.comm import CommBackend, Comms, Communicator, SoloCommunicator, connect
from core.parallel.layout import Layout
from core.parallel.mesh import open_mesh
from core.parallel.plan import Plan
from core.testing.comm import (
    ALL_TO_ALLS,
    CASES,
    DTYPES,
    Case,
    RankResult,
    brought,
    rows_to_send,
)

BRIDGES = {
    "partial-replicated": (Layout.PARTIAL, Layout.REPLICATED),
    "partial-rows": (Layout.PARTIAL, Layout.ROWS),
    "rows-replicated": (Layout.ROWS, Layout.REPLICATED),
    "columns-replicated": (Layout.COLUMNS, Layout.REPLICATED),
    "partial-partial": (Layout.PARTIAL, Layout.PARTIAL),
}


def collect(comms: Comms, rank: int, size: int, device: torch.device) -> RankResult:
    """Every result of this rank; needs the axes tp, of `size` ranks, and dp, of one. Raises
    AssertionError where an argument was changed that must not be."""
    tp = comms.axes["tp"]
    assert (tp.rank, tp.size) == (rank, size), "rank and size of the communicator"
    results = {case: call(comms, case, device) for case in CASES}
    for dtype in DTYPES.values():
        none = torch.empty((0, 4), dtype=dtype, device=device)
        for collective in (tp.all_reduce, tp.reduce_scatter, lambda x: tp.all_gather(x, -1)):
            assert collective(none.clone()).shape[0] == 0, "of no rows there are none"
    ones = [1] * size
    flat = tp.all_to_all(torch.full((size,), rank, device=device), ones, ones)
    assert flat.tolist() == list(range(size)), "one-dimensional rows"
    same = torch.ones(2, 2, device=device)
    assert comms.bridge("dp", src=Layout.PARTIAL, dst=Layout.REPLICATED)(same) is same
    tiny = torch.full((8,), 1.0 if rank == 0 else 2.0**-8, dtype=torch.bfloat16, device=device)
    rounded = tp.all_reduce(tiny)
    # Moved only now: a result that a later call wrote into is found.
    return RankResult({str(case): x.cpu() for case, x in results.items()}, rounded.cpu())


def call(comms: Comms, case: Case, device: torch.device) -> Tensor:
    """The result of one case."""
    tp = comms.axes["tp"]
    if case.name in ALL_TO_ALLS:
        return send_all(tp, case, device)
    x_TE = brought(case, tp.rank, tp.size).to(device)
    if case.name in BRIDGES:
        src, dst = BRIDGES[case.name]
        return comms.bridge("tp", src=src, dst=dst)(x_TE)
    if case.name == "all_reduce":
        return tp.all_reduce(x_TE)
    if case.name == "all_reduce_strided":
        return tp.all_reduce(x_TE.repeat(1, 2)[:, ::2])
    if case.name.startswith("broadcast"):
        got = tp.broadcast(x_TE, 0 if case.name == "broadcast_first" else tp.size - 1)
        assert got is x_TE, "broadcast returns its argument"
        return got
    given = x_TE.clone()
    if case.name == "reduce_scatter":
        got = tp.reduce_scatter(given)
    else:
        got = tp.all_gather(given, int(case.name.removeprefix("all_gather")))
    assert given.double().equal(x_TE.double()), f"{case} changed its argument"
    return got


def send_all(tp: Communicator, case: Case, device: torch.device) -> Tensor:
    """An all_to_all of rows that are not contiguous."""
    x_TE, counts = rows_to_send(case, tp.rank, tp.size)
    receive_counts = [ALL_TO_ALLS[case.name](peer, tp.rank) for peer in range(tp.size)]
    given = x_TE.to(device)
    strided = torch.stack([given, given], 1)[:, 0]
    came = tp.all_to_all(strided, counts, receive_counts)
    assert came.device == given.device, f"{case} took its rows to another device"
    assert strided.double().equal(given.double()), f"{case} changed its argument"
    return came


def run(job: Mapping[str, Any], rank: int) -> RankResult:
    """Meet the other ranks, run, leave."""
    size, device = len(job["devices"]), torch.device(job["devices"][rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    options = _import(job["config"])(**job["options"])
    backend: CommBackend = _import(job["factory"])(options)
    rendezvous = str(Path(job["folder"], "meet"))
    if size == 1:  # a mesh has no group there; the backend must still be right
        return _alone(backend, rendezvous, device)
    mesh = open_mesh(
        Plan(tp_attn=size, tp_expert=size),
        rank,
        torch_backends={"tp": backend.torch_backend, "dp": backend.torch_backend},
        rendezvous=rendezvous,
        timeout_s=60.0,
        device=device,
    )
    comms = connect(mesh.groups, {"tp": backend, "dp": backend})
    result = collect(comms, rank, size, device)
    if job["lose_the_last"] and rank < size - 1:
        missed = list(_lose_the_last(comms.axes["tp"], device))
        result = RankResult(result.of_case, result.rounded, missed)
    mesh.close()
    return result


def _alone(backend: CommBackend, rendezvous: str, device: torch.device) -> RankResult:
    dist.init_process_group(
        backend.torch_backend,
        store=dist.FileStore(rendezvous, 1),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
        device_id=device if device.type == "cuda" else None,
    )
    comms = Comms({"tp": backend.communicator(dist.group.WORLD), "dp": SoloCommunicator()})
    result = collect(comms, 0, 1, device)
    dist.destroy_process_group()
    return result


def _lose_the_last(tp: Communicator, device: torch.device) -> tuple[int, ...]:
    """Whom this rank blames for the error of a sum that the last rank, which leaves, is missing
    in."""
    try:
        while True:  # what was sent before it left is enough for the first
            tp.all_reduce(torch.ones(4, device=device))
    except Exception as error:
        return missing_ranks(error, tp.rank, tp.size)


def _import(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in path.split("."):
        found = getattr(found, attribute)
    return found


def main() -> None:
    """Write this rank's results."""
    job, rank = json.loads(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    result = run(job, rank)
    tensors = {name: x.clone().contiguous() for name, x in result.of_case.items()}
    save_file(
        tensors | {"rounded": result.rounded.clone()},
        Path(job["folder"], f"{rank}.safetensors"),
        metadata={"missed": json.dumps(result.missed)},
    )


if __name__ == "__main__":
    main()
    os._exit(0)  # results are written; the backend's threads may still be closing sockets
