"""Where weights come from, and how layers take their part of them.

Names are those of the Hugging Face checkpoint, for every file format. A layer takes each tensor
once, with the full logical shape that it expects. A rank reads only the part that it keeps.

Shape legend: O outputs, I inputs of a matrix, G = I / 32 groups of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.parallel.sharding import Shard as Shard  # part of this contract

GROUP = 32  # columns of a row with the same scale and minimum in `GroupedInts`


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor: its logical shape, its dtype as read, and its file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    group_bits: int = 0  # 4 or 8: a matrix that `WeightSource.groups` can read; 0: it cannot


class WeightSource(Protocol):
    """An open checkpoint. Raises ModelError, which names the file, if a file is corrupt."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return all tensors, by their Hugging Face names."""
        ...

    def stream(
        self, name: str, dim: int, start: int, stop: int, staging: Tensor
    ) -> Iterator[Tensor]:
        """Yield the entries `start:stop` along `dim`, on the CPU, in the dtype of `tensors()`.

        The slice is read as a matrix. Its rows are the entries of dimension 0 (if `dim` is 0) or of
        all dimensions before `dim`. Each item has the next rows, in order. Rows can be in `staging`
        (uint8, some MiB), so they are valid only until the next item. Reads no more of the file
        than the format requires. Several threads may read, each with its own `staging`.
        """
        ...

    def groups(self, name: str, dim: int, start: int, stop: int, staging: Tensor) -> "GroupedInts":
        """Return the same slice of a matrix with `TensorInfo.group_bits`, not dequantised.

        If `dim` is 1, `start` and `stop` are bounds of groups."""
        ...


@dataclass(frozen=True, slots=True)
class GroupedInts:
    """A matrix of integers from 0 to 2 ** bits - 1, in groups of 32 columns of a row.

    Each group has a scale and a minimum: value = stored * scale + minimum."""

    values_OI: Tensor  # uint8, one value per byte
    scales_OG: Tensor  # float32, (O, I / 32)
    minimums_OG: Tensor  # float32, (O, I / 32)
    bits: int  # 4 or 8
    # Kernels also hold the matrix in this dtype, for products with many rows, which are faster so.
    # A weight format that has the memory sets it. None: they do not.
    wide: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """A matrix in float8_e4m3fn, with one float32 scale for each block of 128 x 128 values.

    The last blocks can be smaller: value = stored * scale."""

    values_OI: Tensor
    scales: Tensor  # (ceil(O / 128), ceil(I / 128))


ExpertWeight = Tensor | BlockFp8
LinearWeight = ExpertWeight | GroupedInts


class WeightReader(Protocol):
    """Gives layers their weights, in the model's dtype, on its device. One for each rank."""

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return this rank's part of a tensor, in `dtype` (None: the model's).

        `shape` is the full logical shape. If the tensor is missing or has another shape, raises
        ModelError, which names the tensor, the file and both shapes."""
        ...

    def take_blocks(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> BlockFp8:
        """Return this rank's part of a matrix of fp8 blocks as it is stored.

        The checkpoint has it as `name` and `name` + "_scale_inv". The bounds of the part must be
        bounds of blocks. `take` of such a tensor dequantises it."""
        ...

    def group_bits(self, name: str) -> int:
        """Return 4 or 8 if `take_groups` can read this matrix, 0 if it is stored differently."""
        ...

    def take_groups(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> GroupedInts:
        """Return this rank's part of a matrix with `group_bits`, as it is stored.

        The part has whole groups, and nothing past the end of the matrix."""
        ...

    def has(self, name: str) -> bool:
        """Whether the checkpoint has an (optional) tensor."""
        ...

    def scope(self, prefix: str) -> "WeightReader":
        """Return a reader that puts `prefix` and a dot before every name."""
        ...


class OpenedWeights(WeightReader, Protocol):
    """The reader of the code that builds the model."""

    def finish(self) -> None:
        """Call when the model is built. Raises ModelError if the checkpoint has unused tensors."""
        ...


class WeightFormat(Protocol):
    """How the matrices of linear and expert layers are held on a device. Chosen once."""

    def keeps_groups(
        self, weights: WeightReader, name: str, shape: tuple[int, int], shard: Shard | None = None
    ) -> bool:
        """Whether `take` returns this part of a matrix as `GroupedInts`."""
        ...

    def take(
        self, weights: WeightReader, name: str, shape: tuple[int, int], shard: Shard | None = None
    ) -> LinearWeight:
        """Return this rank's part of a matrix."""
        ...

    def join(self, parts: Sequence[LinearWeight]) -> LinearWeight:
        """Join matrices with the same input into one: their outputs follow each other."""
        ...


class PlainFormat:
    """Matrices in the model's dtype, for every checkpoint."""

    def keeps_groups(
        self, weights: WeightReader, name: str, shape: tuple[int, int], shard: Shard | None = None
    ) -> bool:
        return False

    def take(
        self, weights: WeightReader, name: str, shape: tuple[int, int], shard: Shard | None = None
    ) -> LinearWeight:
        return weights.take(name, shape, shard)

    def join(self, parts: Sequence[LinearWeight]) -> LinearWeight:
        return parts[0] if len(parts) == 1 else join_rows([plain(part) for part in parts])


def plain(weight: LinearWeight) -> Tensor:
    """Return a weight that is known to be a plain tensor."""
    assert isinstance(weight, Tensor)
    return weight


def expert_weight(weight: LinearWeight) -> ExpertWeight:
    """Return a weight of an expert, which no format holds in groups."""
    assert not isinstance(weight, GroupedInts)
    return weight


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along dimension 0.

    On the meta device (models that are only measured) torch.cat would import torch's compiler,
    which takes a second or more."""
    if not parts[0].is_meta:
        return torch.cat(list(parts))
    num_rows = sum(part.shape[0] for part in parts)
    return torch.empty((num_rows, *parts[0].shape[1:]), dtype=parts[0].dtype, device="meta")
