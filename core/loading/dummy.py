"""Seeded random weights in a model's real shapes, for plans and speeds without a checkpoint.

A weight depends on seed, name and position only, so ranks that keep slices of a tensor agree
whatever tp is. Shape legend: R rows of a tensor seen as (rows, columns), C the columns kept.
"""

import math
import zlib

import torch
from torch import Tensor

from core.interfaces.weights import Shard, WeightReader
from core.loading.progress import ByteMeter, OnProgress
from core.loading.reader import LOAD_TASK, ScopedReader

STD = 0.02
# Length of the table of random numbers that every tensor is cut from: a prime, so that no two
# rows of a tensor start at the same place before a million rows.
TABLE_SIZE = 1_000_003


class DummyReader:
    """Random weights of one rank (core.interfaces.weights.WeightReader)."""

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: OnProgress,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(TABLE_SIZE, generator=generator) * STD
        self._table = table.to(device, dtype)
        self._meter = ByteMeter(LOAD_TASK, 0, on_progress)

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """This rank's part: normal of standard deviation 0.02, and 1 more for norms."""
        part = self._values(name, shape, shard).to(dtype or self._table.dtype)
        if len(shape) == 1 and "norm" in name:
            part += 1
        self._meter.add(part.nbytes)
        return part

    def has(self, name: str) -> bool:
        """Optional tensors are absent."""
        return False

    def scope(self, prefix: str) -> WeightReader:
        """A reader that puts `prefix` and a dot before every name."""
        return ScopedReader(self, prefix)

    def finish(self) -> None:
        """The model is built. Nothing to check: what is not taken is not there."""
        self._meter.finish()

    def _values(self, name: str, shape: tuple[int, ...], shard: Shard | None) -> Tensor:
        """Row r, column c is entry `crc32(name) + r * columns + c` of the table, wrapped."""
        num_columns = shape[-1]
        rows = torch.arange(math.prod(shape[:-1]), dtype=torch.int64).view(shape[:-1])
        local_shape, first_column, last_column = shape, 0, num_columns
        if shard is not None:
            start, stop = shard.bounds(shape[shard.dim])
            local_shape = shard.local_shape(shape)
            if shard.dim == len(shape) - 1:
                first_column, last_column = start, stop
            else:
                rows = rows.narrow(shard.dim, start, stop - start)
        starts_R = rows.flatten() * num_columns + zlib.crc32(name.encode()) + first_column
        part_RC = self._windows(starts_R % TABLE_SIZE, last_column - first_column)
        part = part_RC.view(*rows.shape, last_column - first_column)
        if part.shape == local_shape:
            return part
        assert shard is not None
        whole = part.new_zeros(local_shape)
        whole.narrow(shard.dim, 0, part.shape[shard.dim]).copy_(part)
        return whole

    def _windows(self, starts_R: Tensor, width: int) -> Tensor:
        """Row i: `width` entries of the endless table from `starts_R[i]` on."""
        repeats = 1 + -(-width // TABLE_SIZE)
        endless = self._table.repeat(repeats)[: TABLE_SIZE + max(width, 1)]
        return endless.unfold(0, max(width, 1), 1)[starts_R.to(endless.device)][:, :width]
