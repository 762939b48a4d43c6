"""Which form a device keeps weight matrices in; the only place that decides it.

Knows nothing of how a form is multiplied (core.interfaces.ops) or read (weight readers).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.interfaces.model import BlockQuantization
from core.interfaces.weights import (
    BlockFp8,
    LinearWeight,
    PlainFormat,
    Shard,
    WeightFormat,
    WeightReader,
    join_rows,
)
from core.kernels.block_fp8 import BLOCK, dequantize

_FP8_CAPABILITY = (9, 0)  # of a CUDA device that multiplies e4m3 matrices fast enough: Hopper


class BlockFp8Format:
    """Matrices as the checkpoint holds them, in fp8 blocks, wherever a rank's part is made of whole
    blocks; in `dtype` where it is not."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

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
        return join_rows([self._plain(part) for part in parts])

    def _plain(self, weight: LinearWeight) -> Tensor:
        return dequantize(weight, self._dtype) if isinstance(weight, BlockFp8) else weight


def _between_blocks(shard: Shard, size: int) -> bool:
    start, stop = shard.bounds(size)
    return start % BLOCK == 0 and (stop % BLOCK == 0 or stop == size)


def select_format(
    device: torch.device,
    quantization: BlockQuantization | None,
    dtype: torch.dtype = torch.bfloat16,
) -> WeightFormat:
    """The form for `device` of a checkpoint's weights; `dtype` is the model's.

    fp8 blocks stay what they are on GPUs that multiply them, and become plain matrices on CPUs and
    older GPUs."""
    if quantization is None or (quantization.rows, quantization.columns) != (BLOCK, BLOCK):
        return PlainFormat()
    if device.type != "cuda":
        return PlainFormat()
    # Without a GPU here, a plan is made for other machines.
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        return PlainFormat()
    return BlockFp8Format(dtype)
