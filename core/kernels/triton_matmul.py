"""Linear layers of many rows on a Hopper GPU, with the product of gate and up computed in place.

One program for each processor takes an equal share of all steps of all tiles ("stream-K", Osama
et al., arXiv 2301.03598), so that a few large tiles keep every processor busy; a tile that is
shared is added up in one order. Tiles come through the tensor copy engine. Knows nothing of which
kernel suits which shape (core.kernels.triton_linear).
Shape legend: T rows, O rows of the weight, I inputs. A tile has BLOCK_O rows of the weight twice:
with GATED of the gate and of what it multiplies, else neighbours.
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

from core.interfaces.ops import LinearKernel
from core.kernels.dependent_launch import let_successor_start, options, wait_for_predecessor


@triton.jit
def _store_tile(
    first_TO,
    second_TO,
    bias_ptr,
    out_ptr,
    first_T,
    first_O,
    second_O,
    num_rows,
    SIZE_O: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Add the bias, multiply gate and up, store."""
    rows_T = first_T + tl.arange(0, BLOCK_T)
    columns_O = tl.arange(0, BLOCK_O)
    size: tl.constexpr = SIZE_O // 2 if GATED else SIZE_O
    if HAS_BIAS:
        inside_O = first_O + columns_O < size
        bias_O = tl.load(bias_ptr + first_O + columns_O, mask=inside_O, other=0.0)
        first_TO += bias_O.to(tl.float32)[None, :]
        inside_O = second_O + columns_O < SIZE_O
        bias_O = tl.load(bias_ptr + second_O + columns_O, mask=inside_O, other=0.0)
        second_TO += bias_O.to(tl.float32)[None, :]
    places_TO = out_ptr + rows_T[:, None].to(tl.int64) * size + columns_O[None, :]
    inside_T = rows_T[:, None] < num_rows
    if GATED:
        first_TO = first_TO / (1.0 + tl.exp(-first_TO)) * second_TO
    else:
        tl.store(
            places_TO + second_O,
            second_TO.to(out_ptr.dtype.element_ty),
            mask=inside_T & (second_O + columns_O < size)[None, :],
        )
    tl.store(
        places_TO + first_O,
        first_TO.to(out_ptr.dtype.element_ty),
        mask=inside_T & (first_O + columns_O < size)[None, :],
    )


@triton.jit
def _add_parts(
    first_TO,
    second_TO,
    parts_ptr,
    ready_ptr,
    program,
    tile_end,
    share,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Add what the next programs have of a tile, in their order; each began with it."""
    inner = tl.arange(0, BLOCK_T)[:, None] * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    other = program + 1
    while other * share < tile_end:
        while tl.atomic_add(ready_ptr + other, 0, sem="acquire") == 0:
            pass
        places = parts_ptr + other.to(tl.int64) * (2 * BLOCK_T * BLOCK_O) + inner
        # Not through the first-level cache, which may hold what stood there before.
        first_TO += tl.load(places, cache_modifier=".cg")
        second_TO += tl.load(places + BLOCK_T * BLOCK_O, cache_modifier=".cg")
        tl.debug_barrier()
        tl.store(ready_ptr + other, 0)  # for the next launch
        other += 1
    return first_TO, second_TO


@triton.jit(do_not_specialize=["num_rows", "share"])
def stream_kernel(
    x_desc,
    weight_desc,
    bias_ptr,
    out_ptr,
    parts_ptr,
    ready_ptr,
    num_rows,
    share,
    SIZE_I: tl.constexpr,
    SIZE_O: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """`share` steps of BLOCK_I inputs, of one tile after the other."""
    STEPS: tl.constexpr = (SIZE_I + BLOCK_I - 1) // BLOCK_I
    TILES_O: tl.constexpr = ((SIZE_O // 2 if GATED else SIZE_O) + BLOCK_O - 1) // BLOCK_O
    num_row_blocks = tl.cdiv(num_rows, BLOCK_T)
    num_tiles = num_row_blocks * (TILES_O if GATED else (TILES_O + 1) // 2)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    # The last programs first: each waits only for those after it.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    unit = program * share
    end = tl.minimum(unit + share, num_tiles * STEPS)
    while unit < end:
        tile = unit // STEPS
        first_step = unit - tile * STEPS
        last_step = tl.minimum(STEPS, first_step + end - unit)
        first_T = tile % num_row_blocks * BLOCK_T  # neighbours share the weight's rows
        if GATED:
            first_O = tile // num_row_blocks * BLOCK_O
            second_O = first_O + SIZE_O // 2
        else:
            first_O = tile // num_row_blocks * (2 * BLOCK_O)
            second_O = first_O + BLOCK_O
        first_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        second_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        for step in tl.range(first_step, last_step, num_stages=STAGES):
            x_TI = x_desc.load([first_T, step * BLOCK_I])
            first_OI = weight_desc.load([first_O, step * BLOCK_I])
            second_OI = weight_desc.load([second_O, step * BLOCK_I])
            if WIDE:  # the interpreter's products of bfloat16 are not its values'
                x_TI = x_TI.to(tl.float32)
                first_OI, second_OI = first_OI.to(tl.float32), second_OI.to(tl.float32)
            first_TO = tl.dot(x_TI, first_OI.T, first_TO)
            second_TO = tl.dot(x_TI, second_OI.T, second_TO)
        unit += last_step - first_step
        if first_step == 0:
            tile_end = tile * STEPS + STEPS
            if unit < tile_end:
                first_TO, second_TO = _add_parts(
                    first_TO,
                    second_TO,
                    parts_ptr,
                    ready_ptr,
                    program,
                    tile_end,
                    share,
                    BLOCK_T,
                    BLOCK_O,
                )
            _store_tile(
                first_TO,
                second_TO,
                bias_ptr,
                out_ptr,
                first_T,
                first_O,
                second_O,
                num_rows,
                SIZE_O,
                GATED,
                HAS_BIAS,
                BLOCK_T,
                BLOCK_O,
            )
        else:
            inner = tl.arange(0, BLOCK_T)[:, None] * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
            places = parts_ptr + program.to(tl.int64) * (2 * BLOCK_T * BLOCK_O) + inner
            tl.store(places, first_TO)
            tl.store(places + BLOCK_T * BLOCK_O, second_TO)
            tl.debug_barrier()  # all of the part is stored before it is ready
            tl.atomic_xchg(ready_ptr + program, 1, sem="release")


@lru_cache(maxsize=16)
def _num_processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 3


def stream(
    weight_OI: Tensor,
    bias_O: Tensor | None,
    *,
    gated: bool,
    dtype: torch.dtype | None,
    tile: Mapping[str, Any],
) -> LinearKernel:
    """A linear layer of rows whose inputs are contiguous; results have `dtype`, or that of x."""
    size_O, size_I = weight_OI.shape
    block_T, block_O, block_I = tile["BLOCK_T"], tile["BLOCK_O"], tile["BLOCK_I"]
    device = weight_OI.device
    processors = _num_processors(device)
    num_outputs = size_O // 2 if gated else size_O
    steps_of_row_block = triton.cdiv(num_outputs, block_O if gated else 2 * block_O) * triton.cdiv(
        size_I, block_I
    )
    weight = TensorDescriptor.from_tensor(weight_OI, [block_O, block_I])
    bias = weight_OI if bias_O is None else bias_O
    ready = torch.zeros(processors, dtype=torch.int32, device=device)
    constants = dict(
        SIZE_I=size_I,
        SIZE_O=size_O,
        GATED=gated,
        HAS_BIAS=bias_O is not None,
        BLOCK_T=block_T,
        BLOCK_O=block_O,
        BLOCK_I=block_I,
        STAGES=tile["num_stages"],
        WIDE=device.type == "cpu",
        num_warps=tile["num_warps"],
        **options(device),
    )

    def run(x_TI: Tensor) -> Tensor:
        x = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
        num_rows = x.shape[0]
        out = torch.empty((num_rows, num_outputs), dtype=dtype or x.dtype, device=device)
        row_blocks = triton.cdiv(num_rows, block_T)
        share = triton.cdiv(row_blocks * steps_of_row_block, processors)
        parts = torch.empty((processors, 2, block_T, block_O), dtype=torch.float32, device=device)
        stream_kernel[(triton.cdiv(row_blocks * steps_of_row_block, share),)](
            TensorDescriptor.from_tensor(x, [block_T, block_I]),
            weight,
            bias,
            out,
            parts,
            ready,
            num_rows,
            share,
            **constants,
        )
        return out

    return run
