"""How layers get their weights: slices of a checkpoint in the model's dtype, on its device.

Keeps account of what was taken, so that a checkpoint with tensors nobody wants is noticed. Knows
nothing of file formats.
"""

import difflib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from core.errors import ModelError
from core.interfaces.weights import Shard, TensorInfo, WeightReader, WeightSource
from core.loading.progress import ByteMeter, OnProgress

LOAD_TASK = "load weights"

# Tensors that checkpoints may hold although no model takes them: buffers older versions of
# transformers saved, and output heads that are tied to the embedding.
_IGNORABLE_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_IGNORABLE_NAMES = frozenset({"lm_head.weight"})


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

    def has(self, name: str) -> bool:
        return self._reader.has(f"{self._prefix}.{name}")

    def scope(self, prefix: str) -> WeightReader:
        return ScopedReader(self._reader, f"{self._prefix}.{prefix}")


class CheckpointReader:
    """Weights of one rank out of an opened checkpoint (core.interfaces.weights.WeightReader)."""

    def __init__(
        self,
        source: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: OnProgress,
    ) -> None:
        self._source, self._dtype, self._device = source, dtype, device
        self._tensors = source.tensors()
        self._taken: set[str] = set()
        total_bytes = sum(_num_bytes(info) for info in self._tensors.values())
        self._meter = ByteMeter(LOAD_TASK, total_bytes, on_progress)

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """This rank's part, in the model's (or that) dtype on its device; read when called."""
        info = self._checked(name, shape)
        dim = shard.dim if shard else 0
        size = shape[dim] if shape else 1
        start, stop = shard.bounds(size) if shard else (0, size)
        part = self._source.read(name, dim, start, stop).to(self._device, dtype or self._dtype)
        if shard is not None and stop - start < shard.local_size(size):
            whole = part.new_zeros(shard.local_shape(shape))
            whole.narrow(dim, 0, stop - start).copy_(part)
            part = whole
        self._taken.add(name)
        self._meter.add(_num_bytes(info))
        return part

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor."""
        return name in self._tensors

    def scope(self, prefix: str) -> WeightReader:
        """A reader that puts `prefix` and a dot before every name."""
        return ScopedReader(self, prefix)

    def surplus(self) -> list[str]:
        """Names in the checkpoint that nobody took and that have no known reason to be there."""
        return sorted(
            name
            for name in self._tensors.keys() - self._taken - _IGNORABLE_NAMES
            if not name.endswith(_IGNORABLE_SUFFIXES)
        )

    def finish(self) -> None:
        """The model is built. Raises ModelError if there is surplus: then the config does not
        describe these weights."""
        self._meter.finish()
        surplus = self.surplus()
        if surplus:
            shown = ", ".join(surplus[:5]) + (", ..." if len(surplus) > 5 else "")
            raise ModelError(
                f"{len(surplus)} tensors of the checkpoint are not part of the model that its "
                f"config.json describes: {shown} (in {self._tensors[surplus[0]].file}); check "
                "that the config and the weights belong together"
            )

    def _checked(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self._tensors.get(name)
        if info is None:
            raise ModelError(_missing_message(name, shape, self._tensors))
        assert name not in self._taken, f"{name} is taken twice"
        if info.shape != shape:
            raise ModelError(
                f"tensor {name} in {info.file} has shape {_text(info.shape)}, but config.json "
                f"needs {_text(shape)}; check that the config and the weights belong together"
            )
        if not info.dtype.is_floating_point or info.dtype.itemsize == 1:
            raise ModelError(
                f"tensor {name} in {info.file} has dtype {info.dtype}, a quantised format that is "
                "not supported; allowed: float32, bfloat16, float16, float64"
            )
        return info


class ShapeReader:
    """Meta tensors instead of weights: what a rank would hold, for planning memory.

    `pieces` maps (name, dim, index of the part) to its number of elements, zeros included.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.pieces: dict[tuple[str, int, int], int] = {}
        self.num_logical_parameters = 0  # of whole tensors, whatever part is kept

    @property
    def num_bytes(self) -> int:
        """Bytes this rank's weights take."""
        return sum(self.pieces.values()) * self._dtype.itemsize

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        shard: Shard | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A meta tensor of the shape that this rank would keep."""
        local = shard.local_shape(shape) if shard else shape
        key = (name, shard.dim, shard.index) if shard else (name, 0, 0)
        self.pieces[key] = math.prod(local)
        self.num_logical_parameters += math.prod(shape)
        return torch.empty(local, dtype=dtype or self._dtype, device="meta")

    def has(self, name: str) -> bool:
        """Optional tensors are taken to be absent."""
        return False

    def scope(self, prefix: str) -> WeightReader:
        """A reader that puts `prefix` and a dot before every name."""
        return ScopedReader(self, prefix)


def _num_bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _missing_message(name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo]) -> str:
    files = sorted({info.file for info in tensors.values()})
    where = files[0] if len(files) == 1 else f"the {len(files)} weight files"
    message = f"tensor {name} of shape {_text(shape)} is missing from {where}"
    close = difflib.get_close_matches(name, tensors, n=1)
    hint = f" (the closest there is: {close[0]})" if close else ""
    return f"{message}{hint}; check that the config and the weights belong together"
