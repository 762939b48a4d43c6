"""One rank that exchanges over memory that processes share, in Triton's interpreter.

    python -m tests.support.peer_rank RANK SIZE FOLDER

Every rank's buffer is a file in FOLDER that all map; results go to FOLDER/RANK.npz.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.kernels.peer_memory import PeerMemory
from plugins.comm._symm_exchange import PeerExchange, buffer_bytes

SLOT_BYTES = 4096 * 3
NUM_PROGRAMS = 2
# Values of every rank's tensor in turn: of one chunk, of several, of more than there are programs.
SIZES = (1, 5, 2048, 4100, 1, 6144)


def value(rank: int, turn: int, count: int, dtype: torch.dtype) -> Tensor:
    """What a rank brings: quarters, whose sums are exact."""
    generator = torch.Generator().manual_seed(100 * turn + rank)
    return (torch.randint(-64, 64, (count,), generator=generator) / 4).to(dtype)


def connect(rank: int, size: int, folder: Path) -> PeerMemory:
    """Map everybody's buffer; the files were made by the test, filled with zeros."""
    num_bytes = buffer_bytes(size, SLOT_BYTES, NUM_PROGRAMS)
    buffers = [
        torch.from_file(str(folder / f"{peer}.buffer"), True, num_bytes, dtype=torch.uint8)
        for peer in range(size)
    ]
    global _kept  # mappings live as long as the process
    _kept = buffers
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers])
    epochs = torch.zeros(NUM_PROGRAMS, dtype=torch.int32)
    return PeerMemory(rank, size, buffers[rank], addresses, epochs)


_kept: list[Tensor] = []


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    memory = connect(rank, size, folder)
    exchange, in_two = PeerExchange(memory, SLOT_BYTES), PeerExchange(memory, SLOT_BYTES, 0)
    results: dict[str, np.ndarray] = {}
    for turn, count in enumerate(SIZES):
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            x = value(rank, turn, count, dtype)
            if exchange.can_sum(x):
                results[f"reduce/{name}/{turn}"] = exchange.reduce(x.clone()).float().numpy()
                results[f"in_two/{name}/{turn}"] = in_two.reduce(x.clone()).float().numpy()
            if exchange.can_carry(x):
                results[f"gather/{name}/{turn}"] = exchange.gather(x).float().numpy()
            parts = value(rank, turn, count * size, dtype)
            if exchange.can_sum(parts, size):
                results[f"part/{name}/{turn}"] = exchange.reduce_part(parts).float().numpy()
    np.savez(folder / f"{rank}.npz", **results)


if __name__ == "__main__":
    main()
