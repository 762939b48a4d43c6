"""Seeded random weights in a model's real shapes, for plans and speeds without a checkpoint.

A weight depends on seed, name and position only, so ranks that keep slices of a tensor agree
whatever tp is. Shape legend: R rows of a tensor seen as (rows, columns), C the columns kept.
"""

import math
import zlib

import torch
from torch import Tensor

from core.disk.progress import ByteMeter, OnProgress
from core.interfaces.weights import BlockFp8, GroupedInts, Shard, WeightReader
from core.weights.manifest import FP8, TensorRequest, require_whole_blocks
from core.weights.reader import LOAD_TASK, ScopedReader

STD = 0.02
# Length of the table of random numbers that every tensor is cut from: a prime, so that no two
# rows of a tensor start at the same place before a million rows.
TABLE_SIZE = 1_000_003
# Of quantised values; 448 is the largest float8_e4m3fn, and the table's largest is about 5 STD.
FP8_SCALE = 8 * STD / 448


class DummyReader:
    """Random weights of one rank (core.interfaces.weights.WeightReader)."""

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: OnProgress,
        *,
        total_bytes: int = 0,
    ) -> None:
        """`total_bytes`: of all that will be taken; 0: not known."""
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(TABLE_SIZE, generator=generator) * STD
        self._dtype, self._device = dtype, device
        self._cpu_table = torch.cat((table, table))  # so that a window may begin anywhere
        self._tables: dict[torch.dtype, Tensor] = {}  # the same by dtype, on the device
        self._meter = ByteMeter(LOAD_TASK, total_bytes, on_progress)

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """This rank's part: normal of standard deviation 0.02, and 1 more for norms."""
        part = self._values(TensorRequest(name, shape, shard, dtype or self._dtype))
        if len(shape) == 1 and "norm" in name:
            part += 1
        self._meter.add(part.nbytes)
        return part

    def take_blocks(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> BlockFp8:
        """This rank's part, as quantised blocks that all have the same scale."""
        take = TensorRequest(name, shape, shard, FP8, as_blocks=True)
        require_whole_blocks(take)
        scales = torch.full(take.local_scales_shape, FP8_SCALE, device=self._device)
        self._meter.add(take.num_local_bytes)
        return BlockFp8(self._values(take), scales)

    def group_bits(self, name: str) -> int:
        """Made-up matrices are not in groups."""
        return 0

    def take_groups(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> GroupedInts:
        """Never asked for."""
        raise AssertionError(name)

    def has(self, name: str) -> bool:
        """Optional tensors are absent."""
        return False

    def scope(self, prefix: str) -> WeightReader:
        """A reader that puts `prefix` and a dot before every name."""
        return ScopedReader(self, prefix)

    def finish(self) -> None:
        """The model is built. Nothing to check: what is not taken is not there."""
        self._meter.finish()

    def _values(self, take: TensorRequest) -> Tensor:
        """Row r, column c is entry `crc32(name) + r * columns + c` of the table, wrapped."""
        shape, dim = take.shape, take.dim
        num_columns = shape[-1]
        rows = torch.arange(math.prod(shape[:-1]), dtype=torch.int64).view(shape[:-1])
        first_column, last_column = 0, num_columns
        if take.shard is not None:
            start, stop = take.bounds
            if dim == len(shape) - 1:
                first_column, last_column = start, stop
            else:
                rows = rows.narrow(dim, start, stop - start)
        starts_R = rows.flatten() * num_columns + zlib.crc32(take.name.encode()) + first_column
        part_RC = self._windows(take.dtype, starts_R % TABLE_SIZE, last_column - first_column)
        part = part_RC.view(*rows.shape, last_column - first_column)
        if part.shape == take.local_shape:
            return part
        whole = part.new_zeros(take.local_shape)
        whole.narrow(dim, 0, part.shape[dim]).copy_(part)
        return whole

    def _windows(self, dtype: torch.dtype, starts_R: Tensor, width: int) -> Tensor:
        """Row i: `width` entries of the endless table from `starts_R[i]` on."""
        endless = self._table(dtype)
        if width > TABLE_SIZE:
            endless = endless[:TABLE_SIZE].repeat(2 + width // TABLE_SIZE)
        windows = endless.unfold(0, max(width, 1), 1)
        return windows[starts_R.to(self._device)][:, :width]

    def _table(self, dtype: torch.dtype) -> Tensor:
        """The table twice over, in a dtype: values of quantised blocks are divided by the scale."""
        if dtype not in self._tables:
            scale = FP8_SCALE if dtype == FP8 else 1.0
            self._tables[dtype] = (self._cpu_table / scale).to(self._device, dtype)
        return self._tables[dtype]
