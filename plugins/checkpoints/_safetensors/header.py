"""The header of a safetensors file, checked against the file. Knows nothing of torch.

Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}},
then the data (huggingface/safetensors, README "Format").
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec

from core.disk.plain_files import open_plain
from core.errors import ModelError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_TENSORS = 500_000  # of one file; DeepSeek-V3 has 92,000 in all its files
MAX_DIMS = 8
_MAX_SHOWN = 200  # characters of a name or of the decoder's words in an error
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a header: `dtype` as the file spells it, `start` a byte of the file."""

    shape: tuple[int, ...]
    dtype: str
    start: int


def read_header(path: str) -> dict[str, StoredTensor]:
    """Every tensor of a file, by name. Raises ModelError where the file is corrupt or cut off."""
    try:
        with open(open_plain(path), "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > file_bytes - 8:
                raise _corrupt(path, f"its header ends beyond its {file_bytes} bytes")
            if header_bytes > MAX_HEADER_BYTES:
                raise _corrupt(path, f"its header claims {header_bytes} bytes")
            raw_header = file.read(header_bytes)
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}") from error
    header = _decoded(path, raw_header)
    data_start = 8 + header_bytes
    data_bytes = file_bytes - data_start
    stored = {name: _checked(path, name, e, data_start, data_bytes) for name, e in header.items()}
    _require_no_gaps(path, header, data_bytes)
    return stored


def _decoded(path: str, raw_header: bytes) -> dict[str, "_Entry"]:
    try:
        entries = msgspec.json.decode(raw_header, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        if len(entries) > MAX_TENSORS:
            raise _corrupt(path, f"its header has {len(entries)} tensors, beyond {MAX_TENSORS}")
        decoder = msgspec.json.Decoder(_Entry)
        return {name: decoder.decode(raw) for name, raw in entries.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        words = str(error)[:_MAX_SHOWN]
        raise _corrupt(path, f"its header is not the expected JSON ({words})") from error


_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class _Entry(msgspec.Struct):
    dtype: str
    shape: Annotated[list[_Count], msgspec.Meta(max_length=MAX_DIMS)]
    data_offsets: tuple[_Count, _Count]


def _checked(path: str, name: str, entry: _Entry, data_start: int, data_bytes: int) -> StoredTensor:
    name = name[:_MAX_SHOWN]
    if entry.dtype not in ITEM_BYTES:
        raise _corrupt(path, f"tensor {name} has the unknown dtype {entry.dtype[:20]!r}")
    begin, end = entry.data_offsets
    num_bytes = math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
    if end - begin != num_bytes:
        raise _corrupt(
            path, f"tensor {name} of shape {entry.shape} needs {num_bytes} bytes, not {end - begin}"
        )
    if end > data_bytes:
        raise ModelError(
            f"{path} is cut off: tensor {name} ends at byte {end} of its data, which has only "
            f"{data_bytes}; fetch the file again"
        )
    return StoredTensor(tuple(entry.shape), entry.dtype, data_start + begin)


def _require_no_gaps(path: str, header: Mapping[str, _Entry], data_bytes: int) -> None:
    """Tensors lie back to back, as the format demands: no byte is of two of them, or of none."""
    at = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if begin != at:
            kind = "overlaps the one before it" if begin < at else "leaves a gap before it"
            raise _corrupt(path, f"tensor {name[:_MAX_SHOWN]} at byte {begin} of the data {kind}")
        at = end
    if at != data_bytes:
        raise _corrupt(path, f"{data_bytes - at} bytes follow its last tensor")


def _corrupt(path: str, what: str) -> ModelError:
    return ModelError(f"{path} is not a whole safetensors file: {what}; fetch the file again")
