"""fp8 blocks on a GPU: quantising rows, and which kernel multiplies how many of them.

The choice is data (core/gpu_tools/tuned/linear_fp8.json, measured by benchmarks.gpu_fp8_linear),
looked up when a layer is built. The oracle is core.ops.block_fp8. Knows nothing of what the
kernels do inside. Shape legend: T rows, O rows of the weight, I inputs, C blocks of 128 columns.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-call, untyped-decorator"

from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.devices.cuda.linear.triton_fp8_tiles import tiles
from core.gpu_tools import tuning
from core.gpu_tools.dependent_launch import let_successor_start, options, wait_for_predecessor
from core.gpu_tools.fp8_tile import quantize_tile
from core.interfaces.ops import LinearKernel
from core.interfaces.weights import BlockFp8
from core.ops.block_fp8 import BLOCK, FP8, num_blocks

_BLOCKS_OF_A_PROGRAM = 8
_BUSY_PROGRAMS = 132  # enough to keep a large GPU's processors reading weights
_VENDOR_ROWS = 4  # cuBLASLt takes scales of rows in columns aligned to 16 bytes
ANY_ROWS = 1 << 30


@triton.jit(do_not_specialize_on_alignment=["x_ptr", "source_ptr"])
def quantize_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    source_ptr,
    values_ptr,
    scales_ptr,
    x_stride,
    scales_stride_T,
    scales_stride_C,
    SIZE: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_C blocks of 128 columns of one row; with GATHER row i is row source[i] of x."""
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    x_row = tl.load(source_ptr + row) if GATHER else row
    blocks_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = blocks_C[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = columns < SIZE
    x = tl.load(x_ptr + x_row * x_stride + columns, mask=inside, other=0.0)
    values, scale_C = quantize_tile(x)
    tl.store(values_ptr + row * SIZE + columns, values, mask=inside)
    num_blocks = (SIZE + 127) // 128
    places_C = scales_ptr + row * scales_stride_T + blocks_C * scales_stride_C
    tl.store(places_C, scale_C, mask=blocks_C < num_blocks)


def quantize_rows(x_TE: Tensor, source_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(fp8 values (T, E), float32 scales (T, C)) of rows whose elements are contiguous: those of x
    in their order, or in that of `source_T` (int64)."""
    assert source_T is None or source_T.dim() == 1
    num_rows = x_TE.shape[0] if source_T is None else source_T.shape[0]
    shape = (num_rows, num_blocks(x_TE.shape[1]))
    scales_TC = torch.empty(shape, dtype=torch.float32, device=x_TE.device)
    return _quantize(x_TE, source_T, num_rows, scales_TC), scales_TC


def _quantize(x_TE: Tensor, source_T: Tensor | None, stored_rows: int, scales_TC: Tensor) -> Tensor:
    """Values of all rows, in a tensor of `stored_rows`; writes their scales."""
    num_rows, size = x_TE.shape
    if source_T is not None:
        num_rows = source_T.shape[0]
    values_TE = torch.empty((stored_rows, size), dtype=FP8, device=x_TE.device)
    blocks = scales_TC.shape[1]
    if num_rows:
        block_C = min(_BLOCKS_OF_A_PROGRAM, triton.next_power_of_2(blocks))
        quantize_rows_kernel[(num_rows, triton.cdiv(blocks, block_C))](
            x_TE,
            x_TE if source_T is None else source_T,
            values_TE,
            scales_TC,
            x_TE.stride(0),
            scales_TC.stride(0),
            scales_TC.stride(1),
            SIZE=size,
            GATHER=source_T is not None,
            BLOCK_C=block_C,
            num_warps=4,
            **options(x_TE.device),
        )
    return values_TE


def vendor(weight: BlockFp8, bias_O: Tensor | None) -> LinearKernel:
    """cuBLASLt, through torch; rows and results are bfloat16. See `_vendor_multiplies`."""
    weight_IO, scales_CB = weight.values_OI.t(), weight.scales.t()

    def run(x_TI: Tensor) -> Tensor:
        x = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
        num_rows = x.shape[0]
        stored_rows = triton.cdiv(num_rows, _VENDOR_ROWS) * _VENDOR_ROWS
        shape = (num_blocks(x.shape[1]), stored_rows)
        scales_TC = torch.empty(shape, dtype=torch.float32, device=x.device).t()
        values_TI = _quantize(x, None, stored_rows, scales_TC)
        # What stands in rows past the last stays in theirs.
        out_TO = torch._scaled_mm(
            values_TI, weight_IO, scales_TC, scales_CB, bias_O, out_dtype=torch.bfloat16
        )
        return out_TO[:num_rows]

    return run


def _vendor_multiplies(weight: BlockFp8) -> bool:
    size_O, size_I = weight.values_OI.shape
    return (
        weight.values_OI.device.type == "cuda"
        and torch.cuda.get_device_capability(weight.values_OI.device) == (9, 0)
        and size_O % 16 == 0
        and size_I % (4 * BLOCK) == 0  # later versions want scales' rows aligned to 16 bytes
    )


def linear(weight: BlockFp8, bias_O: Tensor | None) -> LinearKernel:
    """x @ W.T + b; rows are quantised by 128 columns, results have their dtype."""
    return _chosen(_contiguous(weight), bias_O, None)


def gated_linear(
    weight: BlockFp8, bias_O: Tensor | None, silu_and_mul: Callable[[Tensor], Tensor]
) -> LinearKernel:
    """silu(first half) * second half of `linear`'s outputs. `silu_and_mul` is for kernels that
    can't do so themselves."""
    return _chosen(_contiguous(weight), bias_O, silu_and_mul)


def prepare(
    weight: BlockFp8,
    bias_O: Tensor | None,
    silu_and_mul: Callable[[Tensor], Tensor] | None,
    tile: tuning.Choice,
) -> LinearKernel:
    """One kernel, for up to `tile["max_rows"]` rows; gated where there is `silu_and_mul`."""
    if tile["path"] == "tiles":
        gated = silu_and_mul is not None and not tile.get("APART", False)
        kernel = tiles(weight, bias_O, gated=gated, quantize_rows=quantize_rows, tile=tile)
    else:
        gated, kernel = False, vendor(weight, bias_O)
    if silu_and_mul is None or gated:
        return kernel
    return lambda x_TI: silu_and_mul(kernel(x_TI))


def _chosen(
    weight: BlockFp8, bias_O: Tensor | None, silu_and_mul: Callable[[Tensor], Tensor] | None
) -> LinearKernel:
    """The fastest kernel for each number of rows."""
    size_O, size_I = weight.values_OI.shape
    num_outputs = size_O if silu_and_mul is None else size_O // 2
    found = measured(weight.values_OI.device, size_O, size_I, silu_and_mul is not None)
    vendor_multiplies = _vendor_multiplies(weight)
    prepare_one = lambda tile: prepare(weight, bias_O, silu_and_mul, tile)  # noqa: E731
    ours = [tile for tile in found if tile["path"] == "tiles"]
    plain = _limits_and_kernels(ours, prepare_one)
    mixed = _limits_and_kernels(found, prepare_one) if vendor_multiplies else plain

    def run(x_TI: Tensor) -> Tensor:
        num_rows = x_TI.shape[0]
        if num_rows == 0:
            return torch.empty((0, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
        limits, kernels = mixed if x_TI.dtype is torch.bfloat16 else plain
        return kernels[bisect_left(limits, num_rows)](x_TI)

    return run


def _limits_and_kernels(
    found: list[tuning.Choice], prepare_one: Callable[[tuning.Choice], LinearKernel]
) -> tuple[list[int], list[LinearKernel]]:
    return [tile["max_rows"] for tile in found], [prepare_one(tile) for tile in found]


def _contiguous(weight: BlockFp8) -> BlockFp8:
    return BlockFp8(weight.values_OI.contiguous(), weight.scales.float().contiguous())


@lru_cache(maxsize=256)
def measured(device: torch.device, size_O: int, size_I: int, gated: bool) -> list[tuning.Choice]:
    """By rising `max_rows`, the last for any number: what the table says of a shape, and where it
    is silent, what is good for most. There always is one of ours for any number."""
    found = tuning.choices("linear_fp8", device, outputs=size_O, inputs=size_I, gated=int(gated))
    measured_rows = found[-1]["max_rows"] if found else 0
    usual = [usual_tile(size_O, rows) for rows in (16, 32, 64, 128, ANY_ROWS)]
    return [*found, *(tile for tile in usual if tile["max_rows"] > measured_rows)]


def usual_tile(size_O: int, max_rows: int) -> dict[str, Any]:
    """Few rows: narrow tiles, so that enough programs read weights. Whole sums, rows quantised
    beforehand and halves multiplied afterwards: what else a tile can do is for measured shapes."""
    block_T, block_O = min(128, max_rows), BLOCK
    while max_rows <= 128 and block_O > 16 and triton.cdiv(size_O, block_O) < _BUSY_PROGRAMS:
        block_O //= 2
    return {
        "path": "tiles",
        "max_rows": max_rows,
        "BLOCK_T": block_T,
        "BLOCK_O": block_O,
        "SPLIT": 1,
        "QUANTIZED": 1,
        "TURNED": 0,
        "APART": True,
        "num_warps": 8 if block_T == 128 and block_O == BLOCK else 4,
        "num_stages": 4 if block_T <= 64 else 3,
    }
