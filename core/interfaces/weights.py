"""Where weights come from and how layers take their share of them.

Names are those of the Hugging Face checkpoint, whatever the file format. A layer takes each
tensor once, with the full logical shape it expects; a rank reads only the part it keeps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.parallel.sharding import Shard as Shard  # part of this contract

GROUP = 32  # columns of a row that share a scale and a minimum in `GroupedInts`


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor: logical shape, dtype as read, and the file that holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    group_bits: int = 0  # 4 or 8: a matrix that `WeightSource.groups` gives; 0: it doesn't


class WeightSource(Protocol):
    """A checkpoint, opened. Raises ModelError naming the file where it is corrupt."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor there is, by its Hugging Face name."""
        ...

    def stream(
        self, name: str, dim: int, start: int, stop: int, staging: Tensor
    ) -> Iterator[Tensor]:
        """Entries `start:stop` along `dim`, on the CPU, in the dtype of `tensors()`.

        The slice is seen as a matrix, with a row for each entry of dimension 0 (`dim` 0) or of all
        dimensions before `dim`, and comes in order, some rows at a time. Rows may lie in `staging`
        (uint8, some MiB), so that they are valid until the next are asked for. Reads no more of the
        file than the format demands. Several threads may read, with a `staging` each.
        """
        ...

    def groups(self, name: str, dim: int, start: int, stop: int, staging: Tensor) -> "GroupedInts":
        """The same slice of a matrix with `TensorInfo.group_bits`, not dequantised. Along `dim` 1
        the bounds lie between groups."""
        ...


@dataclass(frozen=True, slots=True)
class GroupedInts:
    """A matrix of whole numbers from 0 to 2 ** bits - 1, with a scale and a minimum for each 32
    columns of a row: value = stored * scale + minimum."""

    values_OI: Tensor  # uint8, one a byte
    scales_OG: Tensor  # float32, (O, I / 32)
    minimums_OG: Tensor  # float32, (O, I / 32)
    bits: int  # 4 or 8
    # In which dtype kernels also hold the matrix for products of many rows, which cost less there;
    # set by a format that has the memory. None: they don't.
    wide: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """A matrix in float8_e4m3fn with one float32 scale for each block of 128 x 128 values (the
    last blocks may be smaller): value = stored * scale."""

    values_OI: Tensor
    scales: Tensor  # (ceil(O / 128), ceil(I / 128))


ExpertWeight = Tensor | BlockFp8
LinearWeight = ExpertWeight | GroupedInts


class WeightReader(Protocol):
    """What layers are built from; one for each rank. Converts to the model's dtype and device."""

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """This rank's part of a tensor, in `dtype` where that is not to be the model's. Raises
        ModelError naming tensor, file and both shapes where it is missing or its full shape is not
        `shape`."""
        ...

    def take_blocks(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> BlockFp8:
        """This rank's part of a matrix that is stored as fp8 blocks (`name` and
        `name` + "_scale_inv"), as it is. Its bounds must lie between blocks. `take` of such a
        tensor dequantises it."""
        ...

    def group_bits(self, name: str) -> int:
        """4 or 8 where `take_groups` can give a matrix, 0 where it is stored in another way."""
        ...

    def take_groups(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> GroupedInts:
        """This rank's part of a matrix with `group_bits`, as it is stored. It holds whole groups,
        and nothing past the end of the matrix."""
        ...

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds an (optional) tensor."""
        ...

    def scope(self, prefix: str) -> "WeightReader":
        """A reader that puts `prefix` and a dot before every name."""
        ...


class OpenedWeights(WeightReader, Protocol):
    """A reader as whoever builds the model gets it."""

    def finish(self) -> None:
        """The model is built. Raises ModelError where something of a checkpoint was left over."""
        ...


class WeightFormat(Protocol):
    """How the matrices of linear and expert layers are kept on a device; chosen once."""

    def keeps_groups(
        self, weights: WeightReader, name: str, shape: tuple[int, int], shard: Shard | None = None
    ) -> bool:
        """Whether `take` gives this part of a matrix in groups."""
        ...

    def take(
        self, weights: WeightReader, name: str, shape: tuple[int, int], shard: Shard | None = None
    ) -> LinearWeight:
        """This rank's part of a matrix."""
        ...

    def join(self, parts: Sequence[LinearWeight]) -> LinearWeight:
        """Matrices that read the same input, as one: outputs back to back."""
        ...


class PlainFormat:
    """Matrices in the model's dtype, whatever the checkpoint holds."""

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
    """A weight that is known to be a plain tensor."""
    assert isinstance(weight, Tensor)
    return weight


def expert_weight(weight: LinearWeight) -> ExpertWeight:
    """A weight of an expert, which no format keeps in groups."""
    assert not isinstance(weight, GroupedInts)
    return weight


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Tensors back to back along dimension 0. Of models that only are measured without computing:
    on the meta device torch.cat imports torch's compiler, which takes a second or more."""
    if not parts[0].is_meta:
        return torch.cat(list(parts))
    num_rows = sum(part.shape[0] for part in parts)
    return torch.empty((num_rows, *parts[0].shape[1:]), dtype=parts[0].dtype, device="meta")
