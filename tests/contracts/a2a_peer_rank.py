"""One rank of the moe_a2a contract of symm_mem: rows lie in memory that ranks share.

    python -m tests.contracts.a2a_peer_rank RANK SIZE FOLDER [DEVICE]

Without DEVICE buffers are files in FOLDER that all ranks map, and kernels run in Triton's
interpreter. With `cuda` ranks take the GPUs in turn; several on one GPU need
TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1. Graphs are captured there, too. Results go to
FOLDER/RANK.npz.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.devices.cuda.linear import triton_fp8
from core.gpu_tools import peer_memory
from core.gpu_tools.peer_memory import PeerMemory
from core.interfaces.comm import Communicator
from core.interfaces.moe_a2a import Dispatcher
from core.ops.block_fp8 import dequantize_rows
from core.parallel.mesh import open_mesh
from core.parallel.plan import Plan
from core.plugin.hookspecs import NoOptions
from core.testing.moe_a2a import CASES, MAX_ROWS, NUM_STEPS, Case, rows_of, run_steps, spec_of
from plugins.comm.gloo import GlooBackend
from plugins.moe_a2a._gathered import GatherDispatcher
from plugins.moe_a2a._peer_layout import layout_of
from plugins.moe_a2a.symm_mem import NUM_PROGRAMS, SymmMemDispatcher

FEW_PROGRAMS = 2  # of a launch in the interpreter
HIDDEN = 144  # more than one block of scales, and a part of one
FEW_ROWS = 6  # that buffers hold where a step fills them, and where it is carried otherwise
MANY = 40  # bytes of a file for each value that a case moves


def cases(size: int) -> list[tuple[Case, int]]:
    """The cases of this many ranks, and the rows that buffers hold in each. Few, since ranks that
    wait for each other in the interpreter take turns on the machine's cores."""
    some = [*CASES[2:11], *CASES[-9:]] if size == 2 else [CASES[0], CASES[10], CASES[-1]]
    found = [(case, MAX_ROWS) for case in some if (case.num_experts + case.redundant) % size == 0]
    wide = [Case(top_k=16), Case(top_k=16, counts="one_has_most", dtype=torch.bfloat16)]
    full, more = Case(counts="equal"), Case(counts="one_has_most")
    return [*found, *((case, MAX_ROWS) for case in wide), (full, FEW_ROWS), (more, FEW_ROWS)]


class MappedMemory:
    """Buffers of all ranks as files; each case has a range of its own."""

    def __init__(self, rank: int, size: int, folder: Path) -> None:
        self._rank, self._used = rank, 0
        self._files = [
            torch.from_file(str(folder / f"{peer}.buffer"), True, file_bytes(size)).view(
                torch.uint8
            )
            for peer in range(size)
        ]

    def take(self, num_bytes: int) -> PeerMemory:
        buffers = [file[self._used : self._used + num_bytes] for file in self._files]
        self._used += num_bytes
        addresses = torch.tensor([buffer.data_ptr() for buffer in buffers])
        epochs = torch.zeros(FEW_PROGRAMS, dtype=torch.int32)
        return PeerMemory(self._rank, len(buffers), buffers[self._rank], addresses, epochs)


def file_bytes(size: int) -> int:
    """Of every rank's file: floats of torch.from_file are four bytes."""
    return MANY * size * MAX_ROWS * HIDDEN * len(cases(size))


def build(
    case: Case, max_rows: int, comm: Communicator, device: torch.device, mapped: MappedMemory | None
) -> Dispatcher:
    """The dispatcher of this rank."""
    spec = spec_of(case, comm, "decode", HIDDEN, device)
    num_programs = NUM_PROGRAMS if mapped is None else FEW_PROGRAMS
    layout = layout_of(spec, max_rows, num_programs, fp8=spec.fp8)
    memory = (
        peer_memory.connect(comm.group, layout.num_bytes, num_programs, key="test", instead="none")
        if mapped is None
        else mapped.take(layout.num_bytes)
    )
    assert memory is not None
    rest = GatherDispatcher(spec)
    return SymmMemDispatcher(spec, layout, memory, rest)


def let_others_run() -> None:
    """In the interpreter a program that waits for a flag would keep others from their cores."""
    from triton.runtime.interpreter import InterpreterBuilder

    take: Any = InterpreterBuilder.create_atomic_rmw

    def take_and_rest(*arguments: Any) -> Any:
        seen = take(*arguments)
        time.sleep(0.0002)
        return seen

    InterpreterBuilder.create_atomic_rmw = take_and_rest


def main() -> None:
    """Write this rank's results."""
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    on_gpu = len(sys.argv) > 4
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    mesh = open_mesh(
        Plan(dp=size, ep=size),
        rank,
        torch_backends={"ep": "gloo"},
        rendezvous=str(folder / "meet"),
        timeout_s=60.0,
    )
    comm = GlooBackend(NoOptions()).communicator(mesh.group("ep"))
    if not on_gpu:
        let_others_run()
    mapped = None if on_gpu else MappedMemory(rank, size, folder)
    results: dict[str, np.ndarray] = {}
    for case, max_rows in cases(size):
        dispatcher = build(case, max_rows, comm, device, mapped)
        for step, out in enumerate(run_steps(case, dispatcher, comm, HIDDEN, device)):
            results[f"{case}/{max_rows}/{step}"] = out.double().numpy()
        for step in range(NUM_STEPS if case.fp8 else 0):  # the rows as they travel
            x_TE = rows_of(case, size, rank, step, HIDDEN).x_TE.to(device)
            carried = dequantize_rows(*triton_fp8.quantize_rows(x_TE), torch.float32)
            results[f"{case}/{max_rows}/{step}/carried"] = carried.double().cpu().numpy()
    if on_gpu:
        for name, out in replayed(comm, device).items():
            results[name] = out.double().cpu().numpy()
    mesh.close()
    with (folder / f"{rank}.npz").open("wb") as file:
        np.savez(file, **results)


def replayed(comm: Communicator, device: torch.device) -> dict[str, Tensor]:
    """Layers of a graph, replayed with other rows and routings; the rows as they went in too."""
    from tests.contracts.a2a_graph import GRAPH_CASES, replay

    found: dict[str, Tensor] = {}
    for name, case in GRAPH_CASES.items():
        dispatcher = build(case, MAX_ROWS, comm, device, None)
        found |= {
            f"graph/{name}/{turn}": out
            for turn, out in enumerate(replay(case, dispatcher, comm, HIDDEN, device))
        }
    return found


if __name__ == "__main__":
    main()
    os._exit(0)  # results are written; gloo's threads may still be closing sockets
