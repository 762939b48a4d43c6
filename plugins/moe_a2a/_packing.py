"""One row with its weights and expert ids as one run of bytes, so that all travels in one
collective. Knows nothing of who sends what to whom.

Shape legend: N rows, E hidden size, K experts of a row, B bytes of a packed row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.ops.block_fp8 import FP8, num_blocks

_ALIGNMENT = 16  # bytes; of packed rows, so that GPUs copy them in whole words


@dataclass(frozen=True, slots=True)
class RowFormat:
    """Where the parts of a packed row lie: its values, then (of float8) their scales, the weights
    of its experts, and the experts' ids (-1: none)."""

    hidden_size: int
    top_k: int
    dtype: torch.dtype  # FP8: scales travel too
    ids_dtype: torch.dtype

    @property
    def num_scales(self) -> int:
        return num_blocks(self.hidden_size) if self.dtype == FP8 else 0

    @property
    def _offsets(self) -> tuple[int, int, int, int]:
        """First byte of scales, weights and ids, and one past the last id."""
        scales = _round_up(self.hidden_size * self.dtype.itemsize, 4)
        weights = scales + 4 * self.num_scales
        ids = weights + 4 * self.top_k
        return scales, weights, ids, ids + self.ids_dtype.itemsize * self.top_k

    @property
    def num_bytes(self) -> int:
        """B."""
        return _round_up(self._offsets[-1], _ALIGNMENT)

    def values(self, packed_NB: Tensor) -> Tensor:
        """(N, E), in place."""
        return packed_NB[:, : self.hidden_size * self.dtype.itemsize].view(self.dtype)

    def scales(self, packed_NB: Tensor) -> Tensor:
        """(N, ceil(E / 128)) float32, in place."""
        first, last = self._offsets[:2]
        return packed_NB[:, first:last].view(torch.float32)

    def weights(self, packed_NB: Tensor) -> Tensor:
        """(N, K) float32, in place."""
        first, last = self._offsets[1:3]
        return packed_NB[:, first:last].view(torch.float32)

    def ids(self, packed_NB: Tensor) -> Tensor:
        """(N, K), in place."""
        first, last = self._offsets[2:4]
        return packed_NB[:, first:last].view(self.ids_dtype)

    def pack(self, x_NE: Tensor, scales: Tensor | None, weights_NK: Tensor) -> Tensor:
        """Rows without ids, which depend on where they go."""
        # Zeros: the gaps travel too, and nobody's memory should.
        packed_NB = torch.zeros(
            x_NE.shape[0], self.num_bytes, dtype=torch.uint8, device=x_NE.device
        )
        self.values(packed_NB).copy_(x_NE)
        if scales is not None:
            self.scales(packed_NB).copy_(scales)
        self.weights(packed_NB).copy_(weights_NK)
        return packed_NB


def take_rows(packed_NB: Tensor, index: Tensor) -> Tensor:
    """Packed rows by index; a new tensor. Moves words, not single bytes."""
    return packed_NB.view(torch.int64).index_select(0, index).view(torch.uint8)


def ids_dtype(num_local_experts: int) -> torch.dtype:
    """The smallest integer type that holds the ids of a rank's experts, and -1."""
    return torch.int16 if num_local_experts <= torch.iinfo(torch.int16).max else torch.int32


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
