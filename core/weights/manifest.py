"""What layers ask their reader for: one entry a tensor, and where its parts lie.

Knows nothing of files or of how a tensor is read. Block-quantised matrices hold float8_e4m3fn
values and, under the name of `scales_name`, one scale for each block.
"""

import math
from dataclasses import dataclass

import torch

from core.errors import ModelError
from core.interfaces.model import BlockQuantization
from core.interfaces.weights import GROUP, Shard, TensorInfo

FP8 = torch.float8_e4m3fn
# The only size of blocks that BlockFp8 (core.interfaces.weights) has.
BLOCK = BlockQuantization(128, 128)


@dataclass(frozen=True, slots=True)
class TensorRequest:
    """One call of a reader's `take`, `take_blocks` or `take_groups`."""

    name: str
    shape: tuple[int, ...]  # logical
    shard: Shard | None
    dtype: torch.dtype  # of the result; FP8 where `as_blocks`, uint8 where `group_bits`
    as_blocks: bool = False
    group_bits: int = 0  # of the groups that it is taken as; 0: it is not

    @property
    def dim(self) -> int:
        """The dimension that is cut."""
        return self.shard.dim if self.shard else 0

    @property
    def bounds(self) -> tuple[int, int]:
        """First and one past the last entry that is read along `dim`."""
        size = self.shape[self.dim] if self.shape else 1
        return self.shard.bounds(size) if self.shard else (0, size)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the result, zeros past the end of the tensor included."""
        return self.shard.local_shape(self.shape) if self.shard else self.shape

    @property
    def num_local_values(self) -> int:
        return math.prod(self.local_shape)

    @property
    def num_local_bytes(self) -> int:
        """Bytes of the result, its scales included; of groups as kernels keep them."""
        if self.group_bits:
            # 16 bits of scale and 16 of minimum a group; 8-bit values are two of 4 bits each.
            num_parts = self.group_bits // 4
            return self.num_local_values * num_parts * (4 * GROUP + 32) // (8 * GROUP)
        if not self.as_blocks:
            return self.num_local_values * self.dtype.itemsize
        return self.num_local_values + 4 * math.prod(self.local_scales_shape)

    @property
    def local_scales_shape(self) -> tuple[int, ...]:
        """Shape of this part's scales, where the part is taken as blocks."""
        return scales_shape(self.local_shape, BLOCK)


def scales_name(name: str) -> str:
    """The tensor that holds the scales of a block-quantised matrix."""
    return f"{name}_scale_inv"


def scales_shape(shape: tuple[int, ...], block: BlockQuantization) -> tuple[int, ...]:
    """Shape of the scales of a matrix of `shape`."""
    assert len(shape) == 2, shape
    return (-(-shape[0] // block.rows), -(-shape[1] // block.columns))


def is_block_quantised(info: TensorInfo) -> bool:
    """Whether a stored tensor is of the kind that needs scales."""
    return info.dtype == FP8 and len(info.shape) == 2


def require_whole_blocks(take: TensorRequest) -> None:
    """Raise ModelError where a part that is to be taken as blocks cuts one."""
    edge = (BLOCK.rows, BLOCK.columns)[take.dim]
    if take.shard is None:
        return
    size = take.shape[take.dim]
    if take.shard.padded or any(bound % edge and bound != size for bound in take.bounds):
        raise ModelError(
            f"{take.shard.count} ranks cut tensor {take.name} of shape {shape_text(take.shape)} "
            f"inside its blocks of {BLOCK.rows} x {BLOCK.columns} quantised values; choose fewer "
            "ranks for it (parallel.tp, or more parallel.ep or parallel.dp_attention)"
        )


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape as errors show it."""
    return "x".join(map(str, shape)) or "scalar"
