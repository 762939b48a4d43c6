"""Which form a device keeps weight matrices in; the only place that decides it.

Knows nothing of how a form is multiplied (core.interfaces.ops) or read (weight readers).
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from core.devices.cpu import cpu_grouped_ints
from core.interfaces.model import BlockQuantization
from core.interfaces.weights import (
    GROUP,
    BlockFp8,
    GroupedInts,
    LinearWeight,
    PlainFormat,
    Shard,
    WeightFormat,
    WeightReader,
    join_rows,
)
from core.ops import block_fp8, grouped_ints
from core.ops.block_fp8 import BLOCK

_FP8_CAPABILITY = (9, 0)  # of a CUDA device that multiplies e4m3 matrices fast enough: Hopper


class BlockFp8Format:
    """Matrices as the checkpoint holds them, in fp8 blocks, wherever a rank's part is made of whole
    blocks; in `dtype` where it is not."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def keeps_groups(
        self, weights: WeightReader, name: str, shape: tuple[int, int], shard: Shard | None = None
    ) -> bool:
        """Never."""
        return False

    def take(
        self, weights: WeightReader, name: str, shape: tuple[int, int], shard: Shard | None = None
    ) -> LinearWeight:
        """This rank's part: blocks, or a dequantised matrix."""
        if shard is None or _between_blocks(shard, shape[shard.dim]):
            return weights.take_blocks(name, shape, shard)
        return weights.take(name, shape, shard)

    def join(self, parts: Sequence[LinearWeight]) -> LinearWeight:
        """Outputs back to back. Stays in blocks where every part but the last ends one."""
        if len(parts) == 1:
            return parts[0]
        blocks = [part for part in parts if isinstance(part, BlockFp8)]
        if len(blocks) == len(parts) and all(
            part.values_OI.shape[0] % BLOCK == 0 for part in blocks[:-1]
        ):
            return BlockFp8(
                join_rows([part.values_OI for part in blocks]),
                join_rows([part.scales for part in blocks]),
            )
        return join_rows([_plain(part, self._dtype) for part in parts])


class GroupedIntsFormat:
    """Matrices as the checkpoint holds them, in 4- or 8-bit groups, wherever a rank's part is made
    of whole groups and of as many outputs as the kernel takes; in `dtype` where it is not.

    `widens`: in 16 bits besides, for many rows."""

    def __init__(self, dtype: torch.dtype, *, widens: bool) -> None:
        self._dtype = dtype
        # Of float32 rows float16 is as fast as float32, half as large, and more exact than
        # bfloat16; rows in 16 bits are multiplied by what they are.
        narrow = torch.float16 if dtype is torch.float32 else dtype
        self._wide = narrow if widens else None

    def keeps_groups(
        self, weights: WeightReader, name: str, shape: tuple[int, int], shard: Shard | None = None
    ) -> bool:
        """Whether the checkpoint has groups of it, and this part is made of whole ones."""
        return weights.group_bits(name) > 0 and _between_groups(shape, shard)

    def take(
        self, weights: WeightReader, name: str, shape: tuple[int, int], shard: Shard | None = None
    ) -> LinearWeight:
        """This rank's part: groups, or a dequantised matrix."""
        if self.keeps_groups(weights, name, shape, shard):
            groups = weights.take_groups(name, shape, shard)
            return dataclasses.replace(groups, wide=self._wide)
        return weights.take(name, shape, shard)

    def join(self, parts: Sequence[LinearWeight]) -> LinearWeight:
        """Outputs back to back. Stays in groups where all parts have equally many bits."""
        if len(parts) == 1:
            return parts[0]
        grouped = [part for part in parts if isinstance(part, GroupedInts)]
        if len(grouped) == len(parts) and len({part.bits for part in grouped}) == 1:
            return GroupedInts(
                join_rows([part.values_OI for part in grouped]),
                join_rows([part.scales_OG for part in grouped]),
                join_rows([part.minimums_OG for part in grouped]),
                grouped[0].bits,
                self._wide,
            )
        return join_rows([_plain(part, self._dtype) for part in parts])


def _plain(weight: LinearWeight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, BlockFp8):
        return block_fp8.dequantize(weight, dtype)
    if isinstance(weight, GroupedInts):
        return grouped_ints.dequantize(weight, dtype)
    return weight


def _between_groups(shape: tuple[int, int], shard: Shard | None) -> bool:
    local = shard.local_shape(shape) if shard else shape
    if shard is not None:
        start, stop = shard.bounds(shape[shard.dim])
        if stop - start != local[shard.dim] or (shard.dim == 1 and start % GROUP):
            return False
    return min(local) > 0 and local[0] % cpu_grouped_ints.OUTPUTS == 0 and local[1] % GROUP == 0


def _between_blocks(shard: Shard, size: int) -> bool:
    start, stop = shard.bounds(size)
    return start % BLOCK == 0 and (stop % BLOCK == 0 or stop == size)


def select_format(
    device: torch.device,
    quantization: BlockQuantization | None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    keep_groups: bool = False,
    widen_groups: bool = False,
) -> WeightFormat:
    """The form for `device` of a checkpoint's weights; `dtype` is the model's. `keep_groups`:
    matrices in groups of 4- and 8-bit numbers stay so (model.quantized_weights), with
    `widen_groups` in 16 bits besides.

    fp8 blocks stay what they are on GPUs that multiply them, and become plain matrices on CPUs and
    older GPUs."""
    if keep_groups:
        return GroupedIntsFormat(dtype, widens=widen_groups)
    if quantization is None or (quantization.rows, quantization.columns) != (BLOCK, BLOCK):
        return PlainFormat()
    if device.type != "cuda":
        return PlainFormat()
    # Without a GPU here, a plan is made for other machines.
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        return PlainFormat()
    return BlockFp8Format(dtype)
