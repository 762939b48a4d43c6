"""Linear layers of some hundred rows on a GPU: tiles read by TMA, and their launch.

A fixed number of programs take tiles of (rows, outputs) in turn, neighbours together, so that rows
and weights are found in the L2 cache. A gated layer multiplies its halves before it stores, which
saves the vendor's GEMM a second launch and a round trip to memory. Sums are float32, rounded once.
Knows nothing of which kernel suits which shape (core.devices.cuda.linear.triton_linear). Shape
legend: T rows, O outputs, I inputs. With GATED, rows o and SIZE_O + o of the weight are output o's
gate and up.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from core.gpu_tools.dependent_launch import let_successor_start, options, wait_for_predecessor
from core.interfaces.ops import LinearKernel

_NEIGHBOURS = 8  # tiles of rows that share a weight's tile while it is in the cache
_TMA_ALIGNMENT = 16  # bytes, of addresses and strides
_INTERPRETED_PROGRAMS = 3


@triton.jit
def _add_product(total_TO, x_TI, weight_OI, WIDE: tl.constexpr):
    if WIDE:  # the interpreter's products of bfloat16 are not its values'
        x_TI, weight_OI = x_TI.to(tl.float32), weight_OI.to(tl.float32)
    return tl.dot(x_TI, weight_OI.T, total_TO)


@triton.jit
def wide_kernel(
    x_TI,
    weight_OI,
    bias_ptr,
    out_TO,
    num_rows,
    SIZE_O: tl.constexpr,
    SIZE_I: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    WIDE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """What lies past the end reads as zero, or as another output's weight, and is not stored."""
    NUM_O: tl.constexpr = (SIZE_O + BLOCK_O - 1) // BLOCK_O
    num_T = tl.cdiv(num_rows, BLOCK_T)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    for tile in range(tl.program_id(0), num_T * NUM_O, tl.num_programs(0)):
        first_tile_T = tile // (NEIGHBOURS * NUM_O) * NEIGHBOURS
        tiles_T = min(num_T - first_tile_T, NEIGHBOURS)
        within = tile % (NEIGHBOURS * NUM_O)
        first_T = (first_tile_T + within % tiles_T) * BLOCK_T
        first_O = within // tiles_T * BLOCK_O
        total_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        if GATED:
            up_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        for step in range(0, SIZE_I, BLOCK_I):
            x = x_TI.load([first_T, step])
            total_TO = _add_product(total_TO, x, weight_OI.load([first_O, step]), WIDE)
            if GATED:
                weight = weight_OI.load([SIZE_O + first_O, step])
                up_TO = _add_product(up_TO, x, weight, WIDE)
        if HAS_BIAS:
            columns_O = first_O + tl.arange(0, BLOCK_O)
            bias_O = tl.load(bias_ptr + columns_O, mask=columns_O < SIZE_O, other=0.0)
            total_TO += bias_O.to(tl.float32)[None, :]
        if GATED:
            if HAS_BIAS:
                bias_ptrs = bias_ptr + SIZE_O + columns_O
                bias_O = tl.load(bias_ptrs, mask=columns_O < SIZE_O, other=0.0)
                up_TO += bias_O.to(tl.float32)[None, :]
            total_TO = total_TO / (1.0 + tl.exp(-total_TO)) * up_TO
        out_TO.store([first_T, first_O], total_TO.to(out_TO.dtype))


def wide(
    weight_OI: Tensor,
    bias_O: Tensor | None,
    *,
    gated: bool,
    dtype: torch.dtype | None,
    tile: Mapping[str, Any],
) -> LinearKernel:
    """A linear layer of any number of rows; results have `dtype`, or that of x.

    TMA needs weight rows, and rows of results, of a multiple of 16 bytes."""
    num_weight_rows, size_I = weight_OI.shape
    size_O = num_weight_rows // 2 if gated else num_weight_rows
    block_T, block_O, block_I = tile["BLOCK_T"], tile["BLOCK_O"], tile["BLOCK_I"]
    assert size_O * weight_OI.element_size() % _TMA_ALIGNMENT == 0
    assert size_I * weight_OI.element_size() % _TMA_ALIGNMENT == 0
    weight = TensorDescriptor.from_tensor(weight_OI, [block_O, block_I])
    constants = dict(
        SIZE_O=size_O,
        SIZE_I=size_I,
        GATED=gated,
        HAS_BIAS=bias_O is not None,
        BLOCK_T=block_T,
        BLOCK_O=block_O,
        BLOCK_I=block_I,
        NEIGHBOURS=_NEIGHBOURS,
        WIDE=weight_OI.device.type == "cpu",
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        **options(weight_OI.device),
    )
    bias = weight_OI if bias_O is None else bias_O
    most_programs = _processors(weight_OI.device)
    tiles_O = triton.cdiv(size_O, block_O)

    def run(x_TI: Tensor) -> Tensor:
        x = x_TI if _readable(x_TI) else x_TI.clone(memory_format=torch.contiguous_format)
        num_rows = x.shape[0]
        out = torch.empty((num_rows, size_O), dtype=dtype or x.dtype, device=x.device)
        if num_rows == 0:
            return out
        programs = min(triton.cdiv(num_rows, block_T) * tiles_O, most_programs)
        wide_kernel[(programs,)](
            TensorDescriptor.from_tensor(x, [block_T, block_I]),
            weight,
            bias,
            TensorDescriptor.from_tensor(out, [block_T, block_O]),
            num_rows,
            **constants,
        )
        return out

    return run


def _readable(x_TI: Tensor) -> bool:
    """Whether TMA can read the rows where they lie."""
    apart = x_TI.stride(0) * x_TI.element_size()
    return (
        x_TI.stride(1) == 1
        and apart % _TMA_ALIGNMENT == 0
        and x_TI.data_ptr() % _TMA_ALIGNMENT == 0
    )


@lru_cache(maxsize=16)  # the driver's answer takes microseconds, and never changes
def _processors(device: torch.device) -> int:
    """One program each: a tile takes most of a processor's registers."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
