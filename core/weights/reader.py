"""How layers get their weights: slices of a checkpoint in the model's dtype, on its device.

Keeps account of what was taken, so that a checkpoint with tensors nobody wants is noticed. Knows
nothing of file formats.
"""

import math
from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor

from core.disk.progress import ByteMeter, OnProgress
from core.errors import ModelError
from core.interfaces.model import BlockQuantization
from core.interfaces.weights import (
    GROUP,
    BlockFp8,
    GroupedInts,
    LinearWeight,
    Shard,
    WeightReader,
    WeightSource,
)
from core.weights.check import ADVICE, missing_text, surplus_names, surplus_text, take_problems
from core.weights.load import TakeLoader
from core.weights.manifest import BLOCK, FP8, TensorRequest, require_whole_blocks
from core.weights.prefetch import NUM_THREADS, Prefetcher

LOAD_TASK = "load weights"


class ScopedReader:
    """A reader whose names all start with a prefix."""

    def __init__(self, reader: WeightReader, prefix: str) -> None:
        self._reader, self._prefix = reader, prefix

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        return self._reader.take(f"{self._prefix}.{name}", shape, shard, dtype)

    def take_blocks(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> BlockFp8:
        return self._reader.take_blocks(f"{self._prefix}.{name}", shape, shard)

    def group_bits(self, name: str) -> int:
        return self._reader.group_bits(f"{self._prefix}.{name}")

    def take_groups(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> GroupedInts:
        return self._reader.take_groups(f"{self._prefix}.{name}", shape, shard)

    def has(self, name: str) -> bool:
        return self._reader.has(f"{self._prefix}.{name}")

    def scope(self, prefix: str) -> WeightReader:
        return ScopedReader(self._reader, f"{self._prefix}.{prefix}")


class CheckpointReader:
    """Weights of one rank out of an opened checkpoint (core.interfaces.weights.WeightReader).

    `expected`: what the rank is going to take, as a `ShapeReader` recorded it; it is read ahead, in
    that order. What is taken beside it is read when it is asked for. `all_taken`: this rank takes
    the whole model, so that whatever nobody took is surplus; otherwise other ranks take the rest,
    and `check_checkpoint` has compared the whole before.
    """

    def __init__(
        self,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: OnProgress,
        *,
        block: BlockQuantization = BLOCK,
        ignored: Sequence[str] = (),
        expected: Sequence[TensorRequest] = (),
        all_taken: bool = True,
    ) -> None:
        self._dtype, self._block = dtype, block
        self._ignored, self._all_taken = ignored, all_taken
        self._tensors = source.tensors()
        self._taken: set[str] = set()
        for take in expected:
            self._require(take)
        total_bytes = sum(self._stored_bytes(take) for take in expected) or sum(
            math.prod(info.shape) * info.dtype.itemsize for info in self._tensors.values()
        )
        self._meter = ByteMeter(LOAD_TASK, total_bytes, on_progress)
        num_threads = NUM_THREADS
        if device.type == "cpu":
            num_threads = min(num_threads, torch.get_num_threads())
        self._prefetcher = Prefetcher(
            expected, TakeLoader(source, device, block).load, num_threads=num_threads
        )

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """This rank's part, in the model's (or that) dtype on its device; blocks until it is
        there. Block-quantised matrices are dequantised."""
        part = self._get(TensorRequest(name, shape, shard, dtype or self._dtype))
        assert isinstance(part, Tensor)
        return part

    def take_blocks(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> BlockFp8:
        """This rank's part of a block-quantised matrix, as it is stored."""
        part = self._get(TensorRequest(name, shape, shard, FP8, as_blocks=True))
        assert isinstance(part, BlockFp8)
        return part

    def group_bits(self, name: str) -> int:
        """Of a matrix that the checkpoint holds in groups; 0: it doesn't."""
        return self._tensors[name].group_bits if name in self._tensors else 0

    def take_groups(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> GroupedInts:
        """This rank's part of a matrix in groups, as it is stored."""
        part = self._get(
            TensorRequest(name, shape, shard, torch.uint8, group_bits=self.group_bits(name))
        )
        assert isinstance(part, GroupedInts)
        return part

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor."""
        return name in self._tensors

    def scope(self, prefix: str) -> WeightReader:
        """A reader that puts `prefix` and a dot before every name."""
        return ScopedReader(self, prefix)

    def surplus(self) -> list[str]:
        """Names in the checkpoint that nobody took and that have no known reason to be there."""
        return surplus_names(self._tensors, self._taken, self._ignored)

    def finish(self) -> None:
        """The model is built. Raises ModelError if there is surplus: then the config does not
        describe these weights."""
        num_left = self._prefetcher.num_left
        self._prefetcher.close()
        assert num_left == 0, f"{num_left} tensors were read ahead for nobody"
        self._meter.finish()
        surplus = self.surplus() if self._all_taken else []
        if surplus:
            raise ModelError(f"{surplus_text(surplus, self._tensors)}; {ADVICE}")

    def _get(self, take: TensorRequest) -> LinearWeight:
        self._require(take)
        part = self._prefetcher.get(take)
        self._taken.add(take.name)
        self._meter.add(self._stored_bytes(take))
        return part

    def _require(self, take: TensorRequest) -> None:
        """Raise ModelError unless the checkpoint holds just what is taken."""
        if take.name not in self._tensors:
            raise ModelError(f"{missing_text([take], self._tensors)}; {ADVICE}")
        problems = take_problems(take, self._tensors, self._block)
        if problems:
            raise ModelError(f"{problems[0]}; {ADVICE}")
        if take.as_blocks:
            require_whole_blocks(take)

    def _stored_bytes(self, take: TensorRequest) -> int:
        """About what is read for a part: the meter counts no scales."""
        start, stop = take.bounds
        size = take.shape[take.dim] if take.shape else 1
        stored = math.prod(take.shape) * self._tensors[take.name].dtype.itemsize
        return stored * (stop - start) // max(1, size)


class ShapeReader:
    """Meta tensors instead of weights: what a rank would hold, for planning memory.

    `manifest` is all calls, in order. `pieces` maps (name, dim, index of the part) to its number of
    elements, zeros included. `present`: names of optional tensors that are there. `group_bits`: of
    the matrices that the checkpoint holds in groups, by name; `widened`: in 16 bits besides.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        present: Container[str] = (),
        group_bits: Mapping[str, int] | None = None,
        *,
        widened: bool = False,
    ) -> None:
        self._dtype, self._present = dtype, present
        self._widened = widened
        self._group_bits = group_bits or {}
        self._names: set[str] = set()
        self.manifest: list[TensorRequest] = []
        self.pieces: dict[tuple[str, int, int], int] = {}
        self.num_bytes = 0  # this rank's weights take, scales of quantised blocks included
        self.num_logical_parameters = 0  # of whole tensors, whatever part is kept

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A meta tensor of the shape that this rank would keep."""
        take = TensorRequest(name, shape, shard, dtype or self._dtype)
        self._record(take)
        return torch.empty(take.local_shape, dtype=take.dtype, device="meta")

    def take_blocks(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> BlockFp8:
        """Meta tensors of the values and scales that this rank would keep. Raises ModelError where
        the part cuts a block."""
        take = TensorRequest(name, shape, shard, FP8, as_blocks=True)
        require_whole_blocks(take)
        self._record(take)
        return BlockFp8(
            torch.empty(take.local_shape, dtype=FP8, device="meta"),
            torch.empty(take.local_scales_shape, dtype=torch.float32, device="meta"),
        )

    def group_bits(self, name: str) -> int:
        """Of a matrix that the checkpoint holds in groups; 0: it doesn't."""
        return self._group_bits.get(name, 0)

    def take_groups(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> GroupedInts:
        """Meta tensors of the values, scales and minimums that this rank would keep."""
        take = TensorRequest(name, shape, shard, torch.uint8, group_bits=self.group_bits(name))
        self._record(take)
        num_outputs, num_inputs = take.local_shape
        if self._widened:
            self.num_bytes += 2 * num_outputs * num_inputs
        numbers = torch.empty((num_outputs, num_inputs // GROUP), device="meta")
        values = torch.empty(take.local_shape, dtype=torch.uint8, device="meta")
        return GroupedInts(values, numbers, numbers, take.group_bits)

    def has(self, name: str) -> bool:
        """Whether an optional tensor is there."""
        return name in self._present

    def scope(self, prefix: str) -> WeightReader:
        """A reader that puts `prefix` and a dot before every name."""
        return ScopedReader(self, prefix)

    def _record(self, take: TensorRequest) -> None:
        self.manifest.append(take)
        index = take.shard.index if take.shard else 0
        self.pieces[take.name, take.dim, index] = take.num_local_values
        self.num_bytes += take.num_local_bytes
        if take.name not in self._names:
            self._names.add(take.name)
            self.num_logical_parameters += math.prod(take.shape)
