"""Collectives over peers' memory: which tensors can be carried so, and how they are launched.

The memory is given (`PeerMemory`); knows nothing of how ranks got it, nor of what carries the rest.
"""

import torch
from torch import Tensor

from core.gpu_tools.dependent_launch import options
from core.gpu_tools.peer_memory import PeerMemory
from plugins.comm._symm_kernels import exchange_kernel

_LEAST_BLOCK, _MOST_BLOCK = 4096, 16384  # bytes that a program moves at once: 16 to 64 a thread
_FLAG_BYTES = 4
# By bytes: two goes send less from three ranks on, for another launch. Measured with two ranks.
DIRECT_BYTES = 4 * 2**20
SUMMED = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNMENT = 128  # bytes, of slots


def buffer_bytes(size: int, slot_bytes: int, num_programs: int) -> int:
    """Of one rank: two slots for each rank, then the flags of every rank's programs."""
    assert slot_bytes % _ALIGNMENT == 0
    return 2 * size * slot_bytes + size * num_programs * _FLAG_BYTES


class PeerExchange:
    """Collectives of one rank; all ranks of the group call the same ones in the same order, on one
    stream. Nothing waits for the device."""

    def __init__(
        self, memory: PeerMemory, slot_bytes: int, direct_bytes: int = DIRECT_BYTES
    ) -> None:
        """`slot_bytes`: the most that one rank sends another at once. `direct_bytes`: the most that
        a rank pushes to its peers for a sum in one go."""
        self._memory, self._slot_bytes, self._direct_bytes = memory, slot_bytes, direct_bytes

    def can_sum(self, x: Tensor, num_parts: int = 1) -> bool:
        """Whether `reduce` takes x (and `reduce_part`, with as many parts as ranks)."""
        return x.dtype in SUMMED and self._fits(x, num_parts)

    def can_carry(self, x: Tensor) -> bool:
        """Whether `gather` takes x, of any type. The same on all ranks, wherever x lies."""
        return x.nbytes % 4 == 0 and self._fits(x, 1)

    def _fits(self, x: Tensor, num_parts: int) -> bool:
        return x.is_contiguous() and 0 < x.nbytes <= num_parts * self._slot_bytes

    def reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, rounded once and the same on all; may be written into x."""
        size = self._memory.size
        pushed = (size - 1) * x.nbytes
        if pushed > self._direct_bytes and x.nbytes % (4 * size) == 0:
            return self.gather(self.reduce_part(x.view(-1))).view_as(x)
        self._launch(x.view(-1), x, x.numel(), cut=False, total=True)
        return x

    def reduce_part(self, x: Tensor) -> Tensor:
        """This rank's part of the sum, along dimension 0; a new tensor."""
        part = x.new_empty(x.shape[0] // self._memory.size, *x.shape[1:])
        self._launch(x.view(-1), part, part.numel(), cut=True, total=True)
        return part

    def gather(self, x: Tensor) -> Tensor:
        """(ranks, *x.shape): what every rank brought; a new tensor."""
        if x.data_ptr() % 4:
            x = x.clone()
        parts = x.new_empty(self._memory.size, *x.shape)
        words = x.view(-1).view(torch.int32)
        self._launch(words, parts.view(-1).view(torch.int32), words.numel(), cut=False, total=False)
        return parts

    def _launch(self, x: Tensor, out: Tensor, num_values: int, *, cut: bool, total: bool) -> None:
        memory = self._memory
        num_programs = memory.epochs.shape[0]
        share = num_values * x.element_size() // num_programs
        block_bytes = min(max(1 << share.bit_length(), _LEAST_BLOCK), _MOST_BLOCK)
        exchange_kernel[(num_programs,)](
            x,
            out,
            memory.buffers,
            memory.epochs,
            num_values,
            self._slot_bytes,
            2 * memory.size * self._slot_bytes,
            RANK=memory.rank,
            NUM_RANKS=memory.size,
            CUT=cut,
            SUM=total,
            BLOCK=block_bytes // x.element_size(),
            num_warps=8,
            **options(x.device),
        )
