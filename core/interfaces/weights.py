"""Where weights come from and how layers take their share of them.

Names are those of the Hugging Face checkpoint, whatever the file format. A layer takes each
tensor once, with the full logical shape it expects; a rank reads only the part it keeps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from core.parallel.sharding import Shard as Shard  # part of this contract


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor: logical shape, dtype as read, and the file that holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str


class WeightSource(Protocol):
    """A checkpoint, opened. Raises ModelError naming the file where it is corrupt."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor there is, by its Hugging Face name."""
        ...

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Entries `start:stop` along `dim`, on the CPU, in the stored (dequantised) dtype.

        Reads no more of the file than that part where the format allows it.
        """
        ...


class WeightReader(Protocol):
    """What layers are built from; one for each rank. Converts to the model's dtype and device."""

    def take(self, name: str, shape: tuple[int, ...], shard: Shard | None = None) -> Tensor:
        """This rank's part of a tensor. Raises ModelError naming tensor, file and both shapes
        where it is missing or its full shape is not `shape`."""
        ...

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds an (optional) tensor."""
        ...

    def scope(self, prefix: str) -> "WeightReader":
        """A reader that puts `prefix` and a dot before every name."""
        ...
