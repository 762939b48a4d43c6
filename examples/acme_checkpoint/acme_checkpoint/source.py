"""Weights from NumPy files, which are mapped into memory and read where they are asked for."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import ModelError
from core.interfaces.weights import GroupedInts, TensorInfo

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class NpySource:
    """Implements core.interfaces.weights.WeightSource."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._arrays = {Path(path).stem: _mapped(path) for path in paths}
        self._infos = {
            Path(path).stem: _info(path, self._arrays[Path(path).stem]) for path in paths
        }

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def stream(
        self, name: str, dim: int, start: int, stop: int, staging: Tensor
    ) -> Iterator[Tensor]:
        array = self._arrays[name]
        part = array[(slice(None),) * dim + (slice(start, stop),)]
        num_rows, width = math.prod(part.shape[: max(dim, 1)]), math.prod(part.shape[max(dim, 1) :])
        # A copy: torch wants memory that may be written.
        yield torch.from_numpy(np.array(part)).reshape(num_rows, width)

    def groups(self, name: str, dim: int, start: int, stop: int, staging: Tensor) -> GroupedInts:
        raise AssertionError("no tensor has group_bits")


def _mapped(path: str) -> Any:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is no NumPy file of numbers: {error}") from error


def _info(path: str, array: Any) -> TensorInfo:
    if array.dtype.name not in _DTYPES:
        raise ModelError(f"{path} holds {array.dtype}; allowed: {', '.join(_DTYPES)}")
    return TensorInfo(tuple(array.shape), _DTYPES[array.dtype.name], path)
