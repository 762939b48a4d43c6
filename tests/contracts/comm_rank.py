"""One rank of the comm contract suite: runs every collective, saves what it got.

    python -m tests.contracts.comm_rank BACKEND[-DEVICE] RANK SIZE RENDEZVOUS RESULT.npz

Inputs are a pure function of (case, rank), so that the test can compute the right answers itself.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from core.cluster.nodes.missing import missing_ranks
from core.interfaces.comm import Comms, Communicator, SoloCommunicator, connect
from core.parallel.layout import Layout
from core.parallel.mesh import open_mesh
from core.parallel.plan import Plan
from core.plugin.plugin_manager import PluginManager
from core.settings.config import PluginChoice

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
}
CARRIED = {"float8_e4m3fn": torch.float8_e4m3fn, "uint8": torch.uint8, "bool": torch.bool}
# Rows of rank i for rank j, of as many ranks as there are: uneven, some empty, none at all, and all
# of one rank's to itself.
ALL_TO_ALLS = {
    "uneven": lambda i, j: (3 * i + 2 * j) % 4,
    "to_one": lambda i, j: 5 if j == 0 else 0,
    "from_one": lambda i, j: j + 1 if i == 1 else 0,
    "none": lambda i, j: 0,
    "own": lambda i, j: 2 if i == j else 0,
}
BRIDGES = {
    "partial-replicated": (Layout.PARTIAL, Layout.REPLICATED),
    "partial-rows": (Layout.PARTIAL, Layout.ROWS),
    "rows-replicated": (Layout.ROWS, Layout.REPLICATED),
    "columns-replicated": (Layout.COLUMNS, Layout.REPLICATED),
    "partial-partial": (Layout.PARTIAL, Layout.PARTIAL),
}


def value(shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> Tensor:
    """What `rank` brings into a collective: quarters of small integers, exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 + rank)
    whole = torch.randint(-64, 64, shape, generator=generator)
    return whole if dtype == torch.int64 else (whole / 4).to(dtype)


def rows_to_send(case: str, rank: int, size: int, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """What `rank` brings into an all_to_all, and how many rows of it each rank is to get."""
    counts = [ALL_TO_ALLS[case](rank, peer) for peer in range(size)]
    return value((sum(counts), 3), rank, torch.float32).abs().clamp(max=8).to(dtype), counts


def run(backend: str, rank: int, size: int, rendezvous: str) -> dict[str, Tensor]:
    """Meet the other ranks, run, leave."""
    backend, _, where = backend.partition("-")
    on_gpus = backend in ("nccl", "symm_mem")
    device = torch.device("cuda", rank) if on_gpus else torch.device(where or "cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    plan = Plan(tp_attn=size, tp_expert=size)
    plugins = PluginManager.load()
    comm_backend = plugins.table("comm").create(PluginChoice(name=backend), key="comm.tp")
    if size == 1:  # a mesh has no group there; the backend must still be right
        store = dist.FileStore(rendezvous, 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=device)
        comms = Comms({"tp": comm_backend.communicator(dist.group.WORLD), "dp": SoloCommunicator()})
        results = collect(comms, rank, size, device)
        dist.destroy_process_group()
        return results
    mesh = open_mesh(
        plan,
        rank,
        torch_backends={"tp": comm_backend.torch_backend, "dp": comm_backend.torch_backend},
        rendezvous=rendezvous,
        timeout_s=60.0,
        device=device,
    )
    comms = connect(mesh.groups, {"tp": comm_backend, "dp": comm_backend})
    results = collect(comms, rank, size, device)
    if backend == "gloo" and rank < size - 1:  # NCCL waits for who does not come
        missing = lose_the_last(comms.axes["tp"])
        Path(f"{rendezvous}.missing{rank}").write_text(str(missing))
    mesh.close()
    return results


def lose_the_last(tp: Communicator) -> tuple[int, ...]:
    """Whom this rank blames for what it gets from a sum that the last rank, which leaves, is
    missing in."""
    try:
        while True:  # what was sent before it left is enough for the first
            tp.all_reduce(torch.ones(4))
    except Exception as error:
        return missing_ranks(error, tp.rank, tp.size)


def collect(comms: Comms, rank: int, size: int, device: torch.device) -> dict[str, Tensor]:
    """Every result of this rank, by name."""
    tp = comms.axes["tp"]
    assert (tp.rank, tp.size) == (rank, size)
    assert comms.axes["dp"].size == 1
    results: dict[str, Tensor] = {}
    for name, dtype in DTYPES.items():
        x_TE = value((6, 4), rank, dtype).to(device)
        results[f"{name}/all_reduce"] = tp.all_reduce(x_TE.clone())
        strided = x_TE.repeat(1, 2)[:, ::2]
        results[f"{name}/all_reduce_strided"] = tp.all_reduce(strided)
        for dim in (0, 1, -1):
            results[f"{name}/all_gather{dim}"] = tp.all_gather(x_TE.clone(), dim)
        given = x_TE.clone()
        results[f"{name}/reduce_scatter"] = tp.reduce_scatter(given)
        assert torch.equal(given, x_TE), "reduce_scatter changed its argument"
        for source in (0, size - 1):
            buffer = x_TE.clone()
            assert tp.broadcast(buffer, source) is buffer
            results[f"{name}/broadcast{source}"] = buffer
        for bridge, (src, dst) in BRIDGES.items():
            results[f"{name}/{bridge}"] = comms.bridge("tp", src=src, dst=dst)(x_TE.clone())
        send_all(tp, name, dtype, device, results)
        for collective in (tp.all_reduce, tp.reduce_scatter, lambda x: tp.all_gather(x, -1)):
            assert collective(x_TE[:0].clone()).shape[0] == 0
    for name, dtype in CARRIED.items():
        send_all(tp, name, dtype, device, results)
        x_TE = value((4, 3), rank, torch.float32).abs().to(dtype).to(device)
        results[f"{name}/all_gather0"] = tp.all_gather(x_TE, 0)
        results[f"{name}/broadcast0"] = tp.broadcast(x_TE.clone(), 0)
    same = value((2, 2), rank, torch.float32).to(device)
    assert comms.bridge("dp", src=Layout.PARTIAL, dst=Layout.REPLICATED)(same) is same
    # One rounding: the sum of 1 + size * 2^-9 in bfloat16 must keep what one hop would drop.
    tiny = torch.full((8,), 1.0 if rank == 0 else 2.0**-8, dtype=torch.bfloat16, device=device)
    results["bfloat16_rounding"] = tp.all_reduce(tiny)
    return results


def send_all(
    comm: Communicator, name: str, dtype: torch.dtype, device: torch.device, results: dict
) -> None:
    """Every all_to_all of one dtype."""
    for case, count in ALL_TO_ALLS.items():
        x_TE, counts = rows_to_send(case, comm.rank, comm.size, dtype)
        receive_counts = [count(peer, comm.rank) for peer in range(comm.size)]
        given = x_TE.to(device)
        strided = torch.stack([given, given], 1)[:, 0]
        came = comm.all_to_all(strided, counts, receive_counts)
        assert came.device == given.device
        results[f"{name}/all_to_all_{case}"] = came
    flat = comm.all_to_all(
        torch.full((comm.size,), comm.rank, device=device), [1] * comm.size, [1] * comm.size
    )
    assert flat.tolist() == list(range(comm.size)), "one-dimensional rows"


def main() -> None:
    """Write this rank's results."""
    backend, rank, size, rendezvous, result = sys.argv[1:]
    torch.set_num_threads(1)
    results = run(backend, int(rank), int(size), rendezvous)
    # Every value is exact in float64, so that numpy's lack of bfloat16 doesn't matter.
    arrays = {name: tensor.double().cpu().numpy() for name, tensor in results.items()}
    with Path(result).open("wb") as file:
        np.savez(file, **arrays)
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in results.items()}
    Path(result + ".dtypes").write_text("\n".join(f"{k} {v}" for k, v in dtypes.items()))


if __name__ == "__main__":
    main()
    os._exit(0)  # results are written; gloo's threads may still be closing sockets
