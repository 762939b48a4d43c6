"""The header of a GGUF file: metadata and where each tensor lies. Knows nothing of torch.

Every length in the file is checked against the file before it is believed, because files come
from strangers. Format: github.com/ggml-org/ggml, docs/gguf.md. The `gguf` library gives the block
sizes; its own reader is not used because it checks no bounds and takes seconds for a vocabulary.
"""

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from core.disk.plain_files import open_plain
from core.errors import ModelError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
# Of what is read at start into memory; the largest published files stay far below.
MAX_HEADER_BYTES = 256 << 20
MAX_KEYS = 100_000
MAX_TENSORS = 1_000_000
MAX_ARRAY_VALUES = 1 << 23
MAX_TEXT_BYTES = 16 << 20
_VERSIONS = (2, 3)
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies. `shape` is in the order of torch: rows first."""

    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    start: int  # byte in the file
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A file's header, checked."""

    path: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def text(self, key: str, default: str | None = None) -> str:
        """A string of the metadata."""
        return str(self._typed(key, str, "a string", default))

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of the metadata."""
        return int(self._typed(key, int, "a whole number", default))

    def number(self, key: str, default: float | None = None) -> float:
        """A number of the metadata."""
        return float(self._typed(key, (int, float), "a number", default))

    def flag(self, key: str, default: bool) -> bool:
        """A truth value of the metadata."""
        return bool(self._typed(key, bool, "true or false", default))

    def sequence(self, key: str, kind: type) -> list[Any]:
        """An array of the metadata whose items are of `kind`."""
        values: list[Any] = self._typed(key, list, "an array", None)
        if not all(isinstance(value, kind) for value in values):
            raise ModelError(f"{self.path}: metadata {key} must be an array of {kind.__name__}")
        return values

    def _typed(self, key: str, kind: Any, expected: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelError(f"{self.path}: metadata {key} is missing; needed: {expected}")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ModelError(f"{self.path}: metadata {key}={value!r} must be {expected}")
        return value


def read_gguf(path: str) -> GGUFFile:
    """Read a file's header. Raises ModelError where the file is corrupt or cut off."""
    try:
        with open(open_plain(path), "rb") as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise ModelError(f"{path} is not a GGUF file: it is shorter than a header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}") from error


def _parse(path: str, data: mmap.mmap) -> GGUFFile:
    cursor = _Cursor(path, data)
    if data[:4] != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file: it starts with {data[:4]!r}")
    version = cursor.scalar(_U32, "the version", at=4)
    if version not in _VERSIONS:
        raise ModelError(
            f"{path} has GGUF version {version}, which is not supported; allowed: 2, 3 "
            "(little-endian)"
        )
    num_tensors = cursor.scalar(_U64, "the tensor count")
    num_keys = cursor.scalar(_U64, "the metadata count")
    metadata: dict[str, Any] = {}
    cursor.limit(num_keys, MAX_KEYS, "metadata keys")
    cursor.limit(num_tensors, MAX_TENSORS, "tensors")
    for _ in range(num_keys):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.corrupt(f"metadata {key!r} is there twice")
        metadata[key] = cursor.value(cursor.scalar(_U32, key), key)
    infos = [_tensor_info(cursor) for _ in range(cursor.bounded(num_tensors, 24, "tensors"))]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.corrupt(f"metadata general.alignment={alignment!r}")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, dims, quantization, offset in infos:
        if name in tensors:
            raise cursor.corrupt(f"tensor {name} is there twice")
        tensors[name] = _located(cursor, name, dims, quantization, data_start + offset)
    return GGUFFile(path, metadata, tensors)


def _tensor_info(cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string("a tensor name")
    num_dims = cursor.scalar(_U32, name)
    if not 1 <= num_dims <= _MAX_DIMS:
        raise cursor.corrupt(f"tensor {name} has {num_dims} dimensions")
    dims = tuple(cursor.scalar(_U64, name) for _ in range(num_dims))
    return name, dims, cursor.scalar(_U32, name), cursor.scalar(_U64, name)


def _located(
    cursor: "_Cursor", name: str, dims: tuple[int, ...], quantization: int, start: int
) -> GGUFTensor:
    try:
        kind = GGMLQuantizationType(quantization)
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise cursor.corrupt(f"tensor {name} has the unknown type {quantization}") from None
    if dims[0] % block_size != 0:
        raise cursor.corrupt(
            f"tensor {name} has rows of {dims[0]}, not a multiple of {kind.name}'s {block_size}"
        )
    num_bytes = math.prod(dims) // block_size * block_bytes
    if start + num_bytes > cursor.num_bytes:
        raise ModelError(
            f"{cursor.path} is cut off: tensor {name} ends at byte {start + num_bytes}, the file "
            f"at {cursor.num_bytes}; fetch the file again"
        )
    return GGUFTensor(tuple(reversed(dims)), kind, start, num_bytes)


class _Cursor:
    """Reads forward through the header; refuses to read past the end."""

    def __init__(self, path: str, data: mmap.mmap) -> None:
        self.path, self._data = path, data
        self.num_bytes = len(data)
        self.position = 0

    def corrupt(self, what: str) -> ModelError:
        return ModelError(f"{self.path} is not a whole GGUF file: {what}; fetch the file again")

    def bounded(self, count: int, item_bytes: int, what: str) -> int:
        """`count`, if that many items of at least `item_bytes` can still follow."""
        if count * item_bytes > self.num_bytes - self.position:
            raise self.corrupt(f"its header claims {count} {what} and ends before them")
        if self.position + count * item_bytes > MAX_HEADER_BYTES:
            raise self.corrupt(f"its header is larger than {MAX_HEADER_BYTES} bytes")
        return count

    def limit(self, count: int, at_most: int, what: str) -> None:
        """Raise ModelError where there are more of something than any model needs."""
        if count > at_most:
            raise self.corrupt(f"its header claims {count} {what}; allowed: up to {at_most}")

    def scalar(self, kind: struct.Struct, what: str, at: int | None = None) -> Any:
        if at is not None:
            self.position = at
        self.bounded(1, kind.size, f"value of {what}")
        (value,) = kind.unpack_from(self._data, self.position)
        self.position += kind.size
        return value

    def string(self, what: str) -> str:
        return self._strings(1, what)[0]

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            item_kind, count = self.scalar(_U32, key), self.scalar(_U64, key)
            self.limit(count, MAX_ARRAY_VALUES, f"values of {key[:100]}")
            if item_kind == _STRING:
                return self._strings(count, key)
            return list(self._numbers(item_kind, count, key))
        return self._numbers(kind, 1, key)[0]

    def _numbers(self, kind: int, count: int, key: str) -> tuple[Any, ...]:
        if kind not in _SCALARS:
            raise self.corrupt(f"metadata {key} has the unknown type {kind}")
        layout = _SCALARS[kind]
        self.bounded(count, struct.calcsize(f"<{layout}"), f"values of {key}")
        packed = struct.Struct(f"<{count}{layout}")
        values = packed.unpack_from(self._data, self.position)
        self.position += packed.size
        return values

    def _strings(self, count: int, what: str) -> list[str]:
        """A vocabulary has 100,000 and more: this loop is what reading a header costs."""
        data, position, limit = self._data, self.position, self.num_bytes
        unpack = _U64.unpack_from
        texts = []
        for _ in range(self.bounded(count, 8, f"strings of {what}")):
            start = position + 8
            if start > limit:
                raise self.corrupt(f"{what} ends beyond the file")
            position = start + unpack(data, position)[0]
            if position > limit:
                raise self.corrupt(f"{what} ends beyond the file")
            if position - start > MAX_TEXT_BYTES:
                raise self.corrupt(f"a text of {what} is longer than {MAX_TEXT_BYTES} bytes")
            texts.append(data[start:position])
        self.position = position
        try:
            return [text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise self.corrupt(f"{what} is not UTF-8 ({error.reason})") from error
