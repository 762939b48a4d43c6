"""Weights from a GGUF file, under their Hugging Face names and in that order of rows.

Only the rows or blocks that are asked for are dequantised. Knows nothing of models or sharding.
"""

from collections.abc import Iterator, Mapping

import torch
from gguf.constants import GGML_QUANT_SIZES
from torch import Tensor

from core.disk.file_rows import RowFile
from core.errors import ModelError
from core.interfaces.weights import GROUP, GroupedInts, TensorInfo
from plugins.checkpoints._gguf.config import (
    GROUPED_BITS,
    ROPE_FACTORS,
    head_dim,
    hf_name,
    is_permuted,
)
from plugins.checkpoints._gguf.dequantize import PLAIN_DTYPES, dequantize, grouped
from plugins.checkpoints._gguf.header import GGUFTensor, read_gguf


class GGUFSource:
    """One GGUF file (core.interfaces.weights.WeightSource)."""

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        """`dtype`: what to dequantise into; plain tensors keep their own."""
        file = read_gguf(path)
        self._path, self._dtype = path, dtype
        self._head_dim = head_dim(file)
        self._stored: dict[str, GGUFTensor] = {}
        self._permuted: set[str] = set()
        self._tensors: dict[str, TensorInfo] = {}
        for gguf_name, tensor in file.tensors.items():
            if gguf_name == ROPE_FACTORS:  # part of the config, see gguf_config
                continue
            name = hf_name(gguf_name)
            if len(tensor.shape) > 2 or (
                len(tensor.shape) == 1 and tensor.quantization not in PLAIN_DTYPES
            ):
                raise ModelError(
                    f"{path}: tensor {gguf_name} of shape {tensor.shape} and type "
                    f"{tensor.quantization.name} is not supported; allowed: matrices, and vectors "
                    "that are not quantised"
                )
            if is_permuted(file, gguf_name):
                if tensor.shape[0] % self._head_dim != 0:
                    raise ModelError(
                        f"{path}: tensor {gguf_name} has {tensor.shape[0]} rows, not a multiple of "
                        f"the head size {self._head_dim}"
                    )
                self._permuted.add(name)
            dtype = PLAIN_DTYPES.get(tensor.quantization, dtype)
            self._stored[name] = tensor
            self._tensors[name] = TensorInfo(
                tensor.shape, dtype, path, GROUPED_BITS.get(tensor.quantization, 0)
            )
        self._file = RowFile(path)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the file."""
        return self._tensors

    def stream(
        self, name: str, dim: int, start: int, stop: int, staging: Tensor
    ) -> Iterator[Tensor]:
        """A slice, dequantised some rows at a time."""
        stored, dtype = self._stored[name], self._tensors[name].dtype
        if start == stop:
            return
        if len(stored.shape) == 1:
            yield self._vector(name, staging)[start:stop].view(-1, 1)
            return
        columns = self._columns(name, dim, start, stop)
        what = f"{self._path}: tensor {name}"
        for raw in self._raw(name, dim, start, stop, staging):
            yield dequantize(raw.contiguous(), stored.quantization, dtype, what)[:, columns]

    def groups(self, name: str, dim: int, start: int, stop: int, staging: Tensor) -> GroupedInts:
        """A slice of a matrix, as it is stored."""
        columns, kind = self._columns(name, dim, start, stop), self._stored[name].quantization
        groups = slice(columns.start // GROUP, columns.stop // GROUP)
        pieces = [
            grouped(raw.contiguous(), kind) for raw in self._raw(name, dim, start, stop, staging)
        ]
        return GroupedInts(
            torch.cat([piece.values_OI[:, columns] for piece in pieces]),
            torch.cat([piece.scales_OG[:, groups] for piece in pieces]),
            torch.cat([piece.minimums_OG[:, groups] for piece in pieces]),
            GROUPED_BITS[kind],
        )

    def _columns(self, name: str, dim: int, start: int, stop: int) -> slice:
        """Where the columns of a part lie among those of the blocks that it touches."""
        if dim == 0:
            return slice(0, self._stored[name].shape[1])
        skip = start % GGML_QUANT_SIZES[self._stored[name].quantization][0]
        return slice(skip, skip + stop - start)

    def _raw(self, name: str, dim: int, start: int, stop: int, staging: Tensor) -> Iterator[Tensor]:
        """The bytes of a matrix's part, some rows at a time, in the order of Hugging Face: whole
        blocks of columns."""
        stored = self._stored[name]
        num_rows, num_columns = stored.shape
        block_size, block_bytes = GGML_QUANT_SIZES[stored.quantization]
        first_row, last_row = (start, stop) if dim == 0 else (0, num_rows)
        first_column, last_column = (0, num_columns) if dim == 0 else (start, stop)
        first_block, last_block = first_column // block_size, -(-last_column // block_size)
        # Permuted rows change places within their head only, so that whole heads are read.
        group = self._head_dim if name in self._permuted else 1
        row = first_row // group * group
        row_bytes = num_columns // block_size * block_bytes
        pieces = self._file.rows(
            stored.start + row * row_bytes,
            row_bytes,
            -(-last_row // group) * group - row,
            (first_block * block_bytes, last_block * block_bytes),
            staging,
            group,
        )
        for raw in pieces:
            if group > 1:
                raw = self._unpermuted(raw)
            yield raw[max(first_row - row, 0) : max(last_row - row, 0)]
            row += raw.shape[0]

    def _vector(self, name: str, staging: Tensor) -> Tensor:
        """A whole tensor of one dimension."""
        stored, dtype = self._stored[name], self._tensors[name].dtype
        columns = (0, stored.num_bytes)
        (raw,) = self._file.rows(stored.start, stored.num_bytes, 1, columns, staging)
        what = f"{self._path}: tensor {name}"
        values = dequantize(raw.contiguous(), stored.quantization, dtype, what)[0]
        return self._unpermuted(values) if name in self._permuted else values

    def _unpermuted(self, rows: Tensor) -> Tensor:
        pairs = rows.unflatten(0, (-1, self._head_dim // 2, 2))  # type: ignore[no-untyped-call]
        halves: Tensor = pairs.transpose(1, 2).flatten(0, 2)
        return halves
