"""Weights from a GGUF file, under their Hugging Face names and in that order of rows.

Only the rows or blocks that are asked for are dequantised. Knows nothing of models or sharding.
"""

from collections.abc import Mapping

import torch
from gguf.constants import GGML_QUANT_SIZES
from torch import Tensor

from core.errors import ModelError
from core.interfaces.weights import TensorInfo
from core.loading.dequantize import PLAIN_DTYPES, dequantize
from core.loading.gguf_config import ROPE_FACTORS, head_dim, hf_name, is_permuted
from core.loading.gguf_header import GGUFTensor, read_gguf


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
            self._tensors[name] = TensorInfo(tensor.shape, dtype, path)
        num_bytes = max((t.start + t.num_bytes for t in file.tensors.values()), default=0)
        self._bytes = torch.from_file(path, shared=False, size=num_bytes, dtype=torch.uint8)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the file."""
        return self._tensors

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """A slice on the CPU."""
        if name not in self._permuted:
            return self._slice(name, dim, start, stop)
        if dim != 0:
            return self._unpermuted(self._slice(name, dim, start, stop))
        # Rows change places within their head only.
        first = start // self._head_dim * self._head_dim
        last = -(-stop // self._head_dim) * self._head_dim
        return self._unpermuted(self._slice(name, 0, first, last))[start - first : stop - first]

    def _unpermuted(self, rows: Tensor) -> Tensor:
        pairs = rows.unflatten(0, (-1, self._head_dim // 2, 2))  # type: ignore[no-untyped-call]
        halves: Tensor = pairs.transpose(1, 2).flatten(0, 2)
        return halves

    def _slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows, or columns, in the order of the file."""
        stored = self._stored[name]
        what, dtype = f"{self._path}: tensor {name}", self._tensors[name].dtype
        raw = self._bytes[stored.start : stored.start + stored.num_bytes]
        if len(stored.shape) == 1:
            return dequantize(raw.view(1, -1), stored.quantization, dtype, what)[0, start:stop]
        num_rows, num_columns = stored.shape
        block_size, block_bytes = GGML_QUANT_SIZES[stored.quantization]
        raw = raw.view(num_rows, num_columns // block_size * block_bytes)
        if dim == 0:
            return dequantize(raw[start:stop], stored.quantization, dtype, what)
        first, last = start // block_size, -(-stop // block_size)
        blocks = raw[:, first * block_bytes : last * block_bytes].contiguous()
        offset = first * block_size
        values = dequantize(blocks, stored.quantization, dtype, what)
        return values[:, start - offset : stop - offset]
