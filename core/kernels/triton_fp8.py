"""fp8 blocks on a GPU: quantising rows, and linear layers over block-quantised weights.

Each step of 128 inputs is one fp8 product, scaled and summed in float32: fp8 tensor cores keep too
few bits of longer sums (DeepSeek-V3, arXiv 2412.19437, 3.3.2). The oracle is
core.kernels.block_fp8. Shape legend: T rows, O outputs, I inputs, C blocks of 128 columns.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-call, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.interfaces.ops import LinearKernel
from core.interfaces.weights import BlockFp8
from core.kernels.block_fp8 import BLOCK, FP8, num_blocks

_BLOCKS_OF_A_PROGRAM = 8
_BUSY_PROGRAMS = 132  # enough to keep a large GPU's processors reading weights


@triton.jit(do_not_specialize_on_alignment=["x_ptr"])
def quantize_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    values_ptr,
    scales_ptr,
    x_stride,
    SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_C blocks of 128 columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    blocks_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = blocks_C[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = columns < SIZE
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    largest_C = tl.max(tl.abs(x), axis=1)
    scale_C = tl.where(largest_C > 0.0, largest_C / 448.0, 1.0)
    values = (x / scale_C[:, None]).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + row * SIZE + columns, values, mask=inside)
    num_blocks = (SIZE + 127) // 128
    tl.store(scales_ptr + row * num_blocks + blocks_C, scale_C, mask=blocks_C < num_blocks)


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    SIZE_I: tl.constexpr,
    SIZE_O: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """BLOCK_T rows by BLOCK_O outputs, which lie in one block of the weight."""
    SCALES_I: tl.constexpr = (SIZE_I + 127) // 128
    EVEN: tl.constexpr = SIZE_I % 128 == 0
    # Neighbouring programs share the weight's rows.
    num_row_blocks = tl.cdiv(num_rows, BLOCK_T)
    first_O = tl.program_id(0) // num_row_blocks * BLOCK_O
    rows_T = (tl.program_id(0) % num_row_blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    columns_O = first_O + tl.arange(0, BLOCK_O)
    columns_I = tl.arange(0, 128)
    inside_T = rows_T < num_rows
    x_ptrs = x_ptr + rows_T[:, None] * SIZE_I + columns_I[None, :]
    outputs_O = (columns_O % SIZE_O).to(tl.int64)
    weight_ptrs = weight_ptr + outputs_O[None, :] * SIZE_I + columns_I[:, None]
    total_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for block in range(SCALES_I):
        step = block * 128
        inside_I = columns_I < SIZE_I - step
        if EVEN:
            x_TI = tl.load(x_ptrs + step, mask=inside_T[:, None], other=0.0)
            weight_IO = tl.load(weight_ptrs + step)
        else:
            x_TI = tl.load(x_ptrs + step, mask=inside_T[:, None] & inside_I[None, :], other=0.0)
            weight_IO = tl.load(weight_ptrs + step, mask=inside_I[:, None], other=0.0)
        scale_T = tl.load(x_scales_ptr + rows_T * SCALES_I + block, mask=inside_T, other=0.0)
        scale = tl.load(weight_scales_ptr + first_O // 128 * SCALES_I + block)
        total_TO += tl.dot(x_TI, weight_IO) * (scale_T * scale)[:, None]
    if HAS_BIAS:
        total_TO += tl.load(bias_ptr + outputs_O).to(tl.float32)[None, :]
    tl.store(
        out_ptr + rows_T[:, None] * SIZE_O + columns_O[None, :],
        total_TO.to(out_ptr.dtype.element_ty),
        mask=inside_T[:, None] & (columns_O[None, :] < SIZE_O),
    )


def quantize_rows(x_TE: Tensor) -> tuple[Tensor, Tensor]:
    """(fp8 values (T, E), float32 scales (T, C)) of rows whose elements are contiguous."""
    num_rows, size = x_TE.shape
    values_TE = torch.empty((num_rows, size), dtype=FP8, device=x_TE.device)
    blocks = num_blocks(size)
    scales_TC = torch.empty((num_rows, blocks), dtype=torch.float32, device=x_TE.device)
    if num_rows:
        block_C = min(_BLOCKS_OF_A_PROGRAM, triton.next_power_of_2(blocks))
        quantize_rows_kernel[(num_rows, triton.cdiv(blocks, block_C))](
            x_TE, values_TE, scales_TC, x_TE.stride(0), SIZE=size, BLOCK_C=block_C, num_warps=4
        )
    return values_TE, scales_TC


def linear(weight: BlockFp8, bias_O: Tensor | None) -> LinearKernel:
    """x @ W.T + b; rows are quantised by 128 columns, results have their dtype."""
    values_OI, scales = weight.values_OI.contiguous(), weight.scales.float().contiguous()
    num_outputs, num_inputs = values_OI.shape

    def run(x_TI: Tensor) -> Tensor:
        num_rows = x_TI.shape[0]
        out_TO = torch.empty((num_rows, num_outputs), dtype=x_TI.dtype, device=x_TI.device)
        if num_rows == 0:
            return out_TO
        x, x_scales = quantize_rows(x_TI if x_TI.stride(1) == 1 else x_TI.contiguous())
        tile = _tile(num_rows, num_outputs)
        grid = triton.cdiv(num_rows, tile["BLOCK_T"]) * triton.cdiv(num_outputs, tile["BLOCK_O"])
        linear_kernel[(grid,)](
            x,
            x_scales,
            values_OI,
            scales,
            scales if bias_O is None else bias_O,
            out_TO,
            num_rows,
            SIZE_I=num_inputs,
            SIZE_O=num_outputs,
            HAS_BIAS=bias_O is not None,
            **tile,
        )
        return out_TO

    return run


def _tile(num_rows: int, num_outputs: int) -> dict[str, Any]:
    """Sizes of one program's tile. Few rows: narrow ones, so that enough programs read weights."""
    block_T = 16
    while block_T < min(num_rows, 128):
        block_T *= 2
    block_O = BLOCK
    row_blocks = triton.cdiv(num_rows, block_T)
    while block_O > 16 and row_blocks * triton.cdiv(num_outputs, block_O) < _BUSY_PROGRAMS:
        block_O //= 2
    return {
        "BLOCK_T": block_T,
        "BLOCK_O": block_O,
        "num_warps": 8 if block_T == 128 and block_O == BLOCK else 4,
        "num_stages": 4 if block_T <= 64 else 3,
    }
