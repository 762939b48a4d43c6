"""An all-reduce with the residual's addition and the norm behind it, in one launch.

Over peers' memory of its own, with more programs than other collectives: each computes whole rows.
Knows nothing of what takes other sizes.
"""

import torch
import triton
from torch import Tensor

from core.gpu_tools.dependent_launch import options
from core.gpu_tools.peer_memory import PeerMemory
from plugins.comm._symm_exchange import DIRECT_BYTES, SUMMED
from plugins.comm._symm_kernels import sum_add_norm_kernel

_MOST_COLUMNS = 16384  # that one program holds


class PeerNorm:
    """One rank's; all ranks of the group call it for the same sizes in the same order, on one
    stream. Nothing waits for the device."""

    def __init__(self, memory: PeerMemory, slot_bytes: int) -> None:
        """`slot_bytes`: the most that one rank sends another at once."""
        self._memory, self._slot_bytes = memory, slot_bytes

    def can_take(self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor) -> bool:
        """Whether calling this with them is possible: the same on all ranks."""
        return (
            x_TE.dtype in SUMMED
            and 0 < x_TE.nbytes <= self._slot_bytes
            and (self._memory.size - 1) * x_TE.nbytes <= DIRECT_BYTES
            and x_TE.shape == residual_TE.shape
            and x_TE.shape[1] <= _MOST_COLUMNS
            and all(each.is_contiguous() for each in (x_TE, residual_TE, weight_E))
        )

    def __call__(
        self, x_TE: Tensor, residual_TE: Tensor, weight_E: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(norm of the new residual, a new tensor; the new residual, written into the old one)."""
        memory, (num_rows, size) = self._memory, x_TE.shape
        out_TE = torch.empty_like(x_TE)
        sum_add_norm_kernel[(memory.epochs.shape[0],)](
            x_TE,
            residual_TE,
            weight_E,
            out_TE,
            memory.buffers,
            memory.epochs,
            num_rows,
            self._slot_bytes,
            2 * memory.size * self._slot_bytes,
            RANK=memory.rank,
            NUM_RANKS=memory.size,
            SIZE=size,
            EPS=eps,
            BLOCK=triton.next_power_of_2(size),
            num_warps=8,
            **options(x_TE.device),
        )
        return out_TE, residual_TE
