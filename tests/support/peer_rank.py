"""Ranks that exchange over memory that processes share: in Triton's interpreter, or GPUs'.

    python -m tests.support.peer_rank cpu|cuda FOLDER SIZE...

For each number of ranks one process a rank, forked from this one: torch and Triton are imported
once. On the CPU buffers are files in FOLDER/SIZE that all ranks map. With cuda ranks take the
GPUs in turn; several on one GPU need TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1. Results go to
RANK.npz there.
"""

import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from triton.runtime import interpreter

from core.devices.cuda.triton_ops import TritonOps
from core.gpu_tools import peer_memory
from core.gpu_tools.peer_memory import PeerMemory
from plugins.comm._symm_exchange import PeerExchange, buffer_bytes
from plugins.comm._symm_norm import PeerNorm

SLOT_BYTES = 4096 * 3
NUM_PROGRAMS = 2
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Values of every rank's tensor in turn: of one chunk, of several, of more than there are programs.
SIZES = (1, 5, 2048, 4100, 1, 6144)
FEW_SIZES = (2048, 6144)  # where many ranks share the cores
EPS = 1e-5


@dataclass(frozen=True)
class NormCase:
    """A sum with the residual's addition and a norm."""

    rows: int
    size: int
    dtype: str
    residual: str

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.size}/{self.dtype}/{self.residual}"


# One row, rows of whole blocks and not, several a program; streams of either type.
NORMS = (
    NormCase(1, 64, "bfloat16", "bfloat16"),
    NormCase(5, 96, "bfloat16", "float32"),
    NormCase(2, 1000, "float32", "float32"),
    NormCase(3, 512, "bfloat16", "bfloat16"),
)
TOO_LARGE = NormCase(13, 512, "bfloat16", "bfloat16")


def sizes_of(num_ranks: int) -> tuple[int, ...]:
    """What so many ranks exchange in turn."""
    return SIZES if num_ranks == 2 else FEW_SIZES


def value(rank: int, turn: int, count: int, dtype: torch.dtype) -> Tensor:
    """What a rank brings."""
    return _quarters((count,), torch.Generator().manual_seed(100 * turn + rank)).to(dtype)


def _quarters(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """So small that sums of eight ranks are exact in bfloat16: the interpreter cuts what it should
    round."""
    return torch.randint(-16, 17, shape, generator=generator) / 4


def norm_inputs(case: NormCase, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's part of the sum, and the residual and weight, which are the same on all."""
    own, common = (torch.Generator().manual_seed(seed) for seed in (rank + 1, 0))
    shape = (case.rows, case.size)
    x_TE = _quarters(shape, own).to(DTYPES[case.dtype])
    residual_TE = _quarters(shape, common).to(DTYPES[case.residual])
    return x_TE, residual_TE, torch.rand(case.size, generator=common).to(DTYPES[case.dtype])


def connect(rank: int, size: int, folder: Path, kind: str, device: str) -> PeerMemory:
    """Map everybody's buffer, which files of zeros hold; or connect those of GPUs."""
    num_bytes = buffer_bytes(size, SLOT_BYTES, NUM_PROGRAMS)
    if device == "cuda":
        group = dist.group.WORLD
        assert group is not None
        memory = peer_memory.connect(group, num_bytes, NUM_PROGRAMS, key="test", instead="none")
        assert memory is not None
        return memory
    buffers = [
        torch.from_file(str(folder / f"{peer}.{kind}"), True, num_bytes, dtype=torch.uint8)
        for peer in range(size)
    ]
    _kept.extend(buffers)  # mappings live as long as the process
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers])
    epochs = torch.zeros(NUM_PROGRAMS, dtype=torch.int32)
    return PeerMemory(rank, size, buffers[rank], addresses, epochs)


_kept: list[Tensor] = []


def run_rank(rank: int, size: int, folder: Path, device: str) -> None:
    """Every collective of one rank."""
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        store = dist.FileStore(str(folder / "meet"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    memory = connect(rank, size, folder, "exchange", device)
    exchange, in_two = PeerExchange(memory, SLOT_BYTES), PeerExchange(memory, SLOT_BYTES, 0)
    results: dict[str, np.ndarray] = {}
    for turn, count in enumerate(sizes_of(size)):
        for name, dtype in DTYPES.items():
            x = value(rank, turn, count, dtype).to(device)
            if exchange.can_sum(x):
                results[f"reduce/{name}/{turn}"] = exchange.reduce(x.clone()).float().cpu().numpy()
                results[f"in_two/{name}/{turn}"] = in_two.reduce(x.clone()).float().cpu().numpy()
            if exchange.can_carry(x):
                results[f"gather/{name}/{turn}"] = exchange.gather(x).float().cpu().numpy()
            parts = value(rank, turn, count * size, dtype).to(device)
            if exchange.can_sum(parts, size):
                results[f"part/{name}/{turn}"] = exchange.reduce_part(parts).float().cpu().numpy()
    norm = PeerNorm(connect(rank, size, folder, "norm", device), SLOT_BYTES)
    ops = TritonOps()
    for case in NORMS:
        x_TE, residual_TE, weight_E = (each.to(device) for each in norm_inputs(case, rank))
        assert norm.can_take(x_TE, residual_TE, weight_E)
        given = (x_TE.clone(), residual_TE.clone(), weight_E)
        for how, (out_TE, sum_TE) in {
            "fused": norm(*given, EPS),
            "apart": ops.add_rms_norm(exchange.reduce(x_TE), residual_TE, weight_E, EPS),
        }.items():
            assert (str(out_TE.dtype), str(sum_TE.dtype)) == (
                f"torch.{case.dtype}",
                f"torch.{case.residual}",
            )
            results[f"{how}/norm/{case.name}"] = out_TE.float().cpu().numpy()
            results[f"{how}/residual/{case.name}"] = sum_TE.float().cpu().numpy()
    assert not norm.can_take(*norm_inputs(TOO_LARGE, rank))
    np.savez(folder / f"{rank}.npz", **results)


def leave_the_cores_to_others() -> None:
    """Who waits for a flag looks at it now and then: there are more ranks than cores."""
    builder = interpreter.interpreter_builder
    look = builder.create_atomic_rmw

    def look_and_rest(*arguments: Any) -> Any:
        time.sleep(0.0002)
        return look(*arguments)

    builder.create_atomic_rmw = look_and_rest


def main() -> None:
    device, folder, sizes = sys.argv[1], Path(sys.argv[2]), [int(size) for size in sys.argv[3:]]
    if device == "cpu":
        leave_the_cores_to_others()
    for size in sizes:
        place = folder / str(size)
        place.mkdir()
        zeros = bytes(buffer_bytes(size, SLOT_BYTES, NUM_PROGRAMS))
        for rank in range(size):
            for kind in ("exchange", "norm"):
                (place / f"{rank}.{kind}").write_bytes(zeros)
        ranks = [_fork(rank, size, place, device) for rank in range(size)]
        failed = [rank for rank, pid in enumerate(ranks) if os.waitpid(pid, 0)[1] != 0]
        if failed:
            sys.exit(f"of {size} ranks these failed: {failed}")


def _fork(rank: int, size: int, folder: Path, device: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        run_rank(rank, size, folder, device)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
