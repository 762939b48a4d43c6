"""GGUF blocks -> float32, vectorised in torch for the common formats.

Bit-identical to `gguf.quants`, which is the oracle and does the formats that are rare; on the
formats here torch is some seven times faster. Block layouts: ggml's `ggml-common.h`.
Shape legend: B blocks, each a row of bytes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from core.errors import ModelError
from core.interfaces.weights import GroupedInts
from plugins.checkpoints._gguf.config import GROUPED_BITS

# Values worked on at once: the steps in between stay in the processor's cache, and torch runs
# operations this small on the calling thread, which is faster than its thread pool where other
# processes load weights too.
CHUNK_VALUES = 1 << 15
# From this size a tensor is shared out over threads of our own.
VALUES_PER_THREAD = 1 << 22


def dequantize(raw: Tensor, kind: GGMLQuantizationType, dtype: torch.dtype, what: str) -> Tensor:
    """Bytes (rows, bytes of a row) -> values (rows, columns), rounded once, to `dtype`.

    `what` names the tensor in errors.
    """
    if kind in PLAIN_DTYPES:
        return raw.view(PLAIN_DTYPES[kind]).to(dtype)
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    num_rows, num_columns = raw.shape[0], raw.shape[1] // block_bytes * block_size
    values = torch.empty((num_rows, num_columns), dtype=dtype)

    def fill(first: int, last: int) -> None:
        for start in range(first, last, chunk_rows):
            rows = raw[start : min(start + chunk_rows, last)]
            chunk = _chunk(rows, kind, what).view(rows.shape[0], num_columns)
            values[start : start + rows.shape[0]] = chunk

    chunk_rows = max(1, CHUNK_VALUES // max(1, num_columns))
    num_threads = min(torch.get_num_threads(), values.numel() // VALUES_PER_THREAD)
    if num_threads < 2:
        fill(0, num_rows)
        return values
    bounds = [num_rows * index // num_threads for index in range(num_threads + 1)]
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(fill, bounds[:-1], bounds[1:]))
    return values


def _chunk(raw: Tensor, kind: GGMLQuantizationType, what: str) -> Tensor:
    """The values of some rows in float32, of whatever shape."""
    if kind in _BLOCK_FORMATS:
        return _BLOCK_FORMATS[kind](raw.reshape(-1, GGML_QUANT_SIZES[kind][1]))
    try:
        return torch.from_numpy(quants.dequantize(raw.numpy(), kind))
    except NotImplementedError as error:
        known = ", ".join(sorted(k.name for k in (*PLAIN_DTYPES, *_BLOCK_FORMATS)))
        raise ModelError(
            f"{what} has the type {kind.name}, which can't be dequantised; use {known} or another "
            "type that gguf.quants knows"
        ) from error


def grouped(raw: Tensor, kind: GGMLQuantizationType) -> GroupedInts:
    """Bytes (rows, bytes of a row) of one of `GROUPED_BITS` -> the numbers that they hold; they
    give what `dequantize` does."""
    num_rows, (_, block_bytes) = raw.shape[0], GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, block_bytes)
    match kind:
        case GGMLQuantizationType.Q4_0:
            scales, values = _half(blocks[:, :2]), _nibbles(blocks[:, 2:], 1)
            minimums = scales * -8
        case GGMLQuantizationType.Q4_1:
            scales, values = _half(blocks[:, :2]), _nibbles(blocks[:, 4:], 1)
            minimums = _half(blocks[:, 2:4])
        case GGMLQuantizationType.Q4_K:
            values, scales, subtracted = _q4_k_parts(blocks)
            minimums = -subtracted
        case _:
            assert kind == GGMLQuantizationType.Q8_0, kind
            scales, values = _half(blocks[:, :2]), blocks[:, 2:] ^ 128  # signed to unsigned
            minimums = scales * -128
    return GroupedInts(
        values.reshape(num_rows, -1),
        scales.reshape(num_rows, -1),
        minimums.reshape(num_rows, -1),
        GROUPED_BITS[kind],
    )


def _half(raw_B2: Tensor) -> Tensor:
    return raw_B2.view(torch.float16).float()


def _nibbles(qs: Tensor, dim: int) -> Tensor:
    """Low halves of the bytes, then the high ones, stacked along a new dimension `dim`."""
    return torch.stack((qs & 15, qs >> 4), dim)


def _q4_0(raw: Tensor) -> Tensor:
    scale_B1, qs = _half(raw[:, :2]), raw[:, 2:]
    return _nibbles(qs, 1).flatten(1).float().sub_(8).mul_(scale_B1)


def _q4_1(raw: Tensor) -> Tensor:
    scale_B1, minimum_B1, qs = _half(raw[:, :2]), _half(raw[:, 2:4]), raw[:, 4:]
    return (_nibbles(qs, 1).flatten(1) * scale_B1).add_(minimum_B1)


def _q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:].view(torch.int8) * _half(raw[:, :2])


def _q4_k(raw: Tensor) -> Tensor:
    """Super-blocks of 8 x 32 values with 6-bit scales and minimums."""
    q_B832, scales_B8, mins_B8 = _q4_k_parts(raw)
    return (q_B832 * scales_B8.unsqueeze(2)).sub_(mins_B8.unsqueeze(2))


def _q4_k_parts(raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stored values (B, 8, 32), and the scale and what is subtracted of each 32."""
    num_blocks = raw.shape[0]
    scale_B1, min_scale_B1 = _half(raw[:, :2]), _half(raw[:, 2:4])
    low, mins, high = raw[:, 4:16].reshape(num_blocks, 3, 4).unbind(1)
    scales_B8 = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), 1)
    mins_B8 = torch.cat((mins & 63, (high >> 4) | ((mins >> 2) & 48)), 1)
    q = _nibbles(raw[:, 16:].reshape(num_blocks, 4, 32), 2).reshape(num_blocks, 8, 32)
    return q, scale_B1 * scales_B8, min_scale_B1 * mins_B8


def _q6_k(raw: Tensor) -> Tensor:
    """Super-blocks of 16 x 16 values: 4 low bits in `ql`, 2 high bits in `qh`."""
    num_blocks = raw.shape[0]
    ql, qh = raw[:, :128], raw[:, 128:192]
    scales_B16 = raw[:, 192:208].view(torch.int8) * _half(raw[:, 208:])
    low = _nibbles(ql.reshape(num_blocks, 2, 64), 2).reshape(num_blocks, 8, 32)
    pairs = qh.reshape(num_blocks, 2, 32)
    high = torch.stack([(pairs >> shift) & 3 for shift in (0, 2, 4, 6)], 2)
    q = low | (high.reshape(num_blocks, 8, 32) << 4)
    values = q.reshape(num_blocks, 16, 16).float().sub_(32)
    return values.mul_(scales_B16.unsqueeze(2))


PLAIN_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_BLOCK_FORMATS: dict[GGMLQuantizationType, Callable[[Tensor], Tensor]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}
