"""Weights from safetensors files: a rank reads only the slices it keeps.

Headers are checked before anything is read. Knows nothing of models or of sharding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import ModelError
from core.interfaces.weights import TensorInfo
from core.loading.safetensors_header import read_header

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsSource:
    """The tensors of several files as one checkpoint (core.interfaces.weights.WeightSource)."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._tensors: dict[str, TensorInfo] = {}
        for path in paths:
            for name, stored in read_header(path).items():
                if name in self._tensors:
                    raise ModelError(
                        f"tensor {name} is in both {self._tensors[name].file} and {path}; "
                        "remove the file that does not belong to this checkpoint"
                    )
                self._tensors[name] = TensorInfo(stored.shape, _DTYPES[stored.dtype], path)
        self._files: dict[str, Any] = {}  # opened when first read

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of every file."""
        return self._tensors

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """A slice on the CPU, in the stored dtype; reads only its bytes from the file."""
        info = self._tensors[name]
        try:
            if info.file not in self._files:
                self._files[info.file] = safe_open(info.file, framework="pt", device="cpu")
            stored = self._files[info.file].get_slice(name)
            index = (slice(None),) * dim + (slice(start, stop),)
            part: Tensor = stored[index] if info.shape else stored[...]
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"can't read tensor {name} from {info.file}: {error}; fetch the file again"
            ) from error
        return part
