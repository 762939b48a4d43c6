"""Weights from safetensors files: a rank reads only the slices it keeps.

Headers are checked before anything is read. Knows nothing of models or of sharding.
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from core.disk.file_rows import RowFile
from core.errors import ModelError
from core.interfaces.weights import GroupedInts, TensorInfo
from plugins.checkpoints._safetensors.header import StoredTensor, read_header

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
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
        self._stored: dict[str, StoredTensor] = {}
        for path in paths:
            for name, stored in read_header(path).items():
                if name in self._tensors:
                    raise ModelError(
                        f"tensor {name} is in both {self._tensors[name].file} and {path}; "
                        "remove the file that does not belong to this checkpoint"
                    )
                self._tensors[name] = TensorInfo(stored.shape, _DTYPES[stored.dtype], path)
                self._stored[name] = stored
        self._files: dict[str, RowFile] = {}  # opened when first read
        self._lock = threading.Lock()

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of every file."""
        return self._tensors

    def stream(
        self, name: str, dim: int, start: int, stop: int, staging: Tensor
    ) -> Iterator[Tensor]:
        """A slice, some rows at a time; reads only its bytes from the file where rows of the rest
        are long enough to be skipped."""
        info, at = self._tensors[name], self._stored[name].start
        shape = info.shape or (1,)
        item_bytes = info.dtype.itemsize
        inner_bytes = math.prod(shape[dim + 1 :]) * item_bytes
        if dim == 0:
            at += start * inner_bytes
            num_rows, row_bytes, columns = stop - start, inner_bytes, (0, inner_bytes)
        else:
            num_rows, row_bytes = math.prod(shape[:dim]), shape[dim] * inner_bytes
            columns = (start * inner_bytes, stop * inner_bytes)
        for rows in self._file(info.file).rows(at, row_bytes, num_rows, columns, staging):
            yield rows.view(info.dtype)

    def groups(self, name: str, dim: int, start: int, stop: int, staging: Tensor) -> GroupedInts:
        """No tensor has `group_bits`."""
        raise AssertionError(name)

    def _file(self, path: str) -> RowFile:
        with self._lock:
            if path not in self._files:
                self._files[path] = RowFile(path)
            return self._files[path]
