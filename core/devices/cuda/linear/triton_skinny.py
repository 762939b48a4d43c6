"""Linear layers of few rows on a GPU: kernels that stream the weight, and their launches.

With few rows a linear layer takes the time its weight needs from memory. Both kernels ask for
weights before they wait for the kernel ahead of them (core.gpu_tools.dependent_launch), so that the
memory is not idle between two layers. Sums are float32, rounded once when stored; the same input
gives the same bits. Knows nothing of which kernel suits which shape
(core.devices.cuda.linear.triton_linear). Shape legend: T rows, O rows of the weight, I inputs. With
GATED rows of the weight are taken in pairs, one of the first half and one of the second: silu(gate)
* up of a pair is one output.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.gpu_tools.dependent_launch import let_successor_start, options, wait_for_predecessor
from core.interfaces.ops import LinearKernel


@triton.jit
def _weight_rows(first_O, SIZE_O: tl.constexpr, GATED: tl.constexpr, BLOCK_O: tl.constexpr):
    """The rows of a program's tile; those past the end begin anew, and are not stored."""
    order_O = first_O + tl.arange(0, BLOCK_O)
    if SIZE_O % BLOCK_O != 0:
        order_O = order_O % SIZE_O
    if GATED:
        order_O = order_O // 2 + order_O % 2 * (SIZE_O // 2)
    return order_O.to(tl.int64)


@triton.jit
def _finish(
    total_TO,
    bias_ptr,
    out_ptr,
    rows_T,
    first_O,
    num_rows,
    SIZE_O: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Add the bias, multiply the halves, store."""
    if HAS_BIAS:
        bias_O = tl.load(bias_ptr + _weight_rows(first_O, SIZE_O, GATED, BLOCK_O))
        total_TO += bias_O.to(tl.float32)[None, :]
    if GATED:
        gate_TP, up_TP = tl.split(total_TO.reshape(BLOCK_T, BLOCK_O // 2, 2))
        result = gate_TP / (1.0 + tl.exp(-gate_TP)) * up_TP
        columns = first_O // 2 + tl.arange(0, BLOCK_O // 2)
    else:
        result = total_TO
        columns = first_O + tl.arange(0, BLOCK_O)
    size: tl.constexpr = SIZE_O // 2 if GATED else SIZE_O
    tl.store(
        out_ptr + rows_T[:, None].to(tl.int64) * size + columns[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=(rows_T[:, None] < num_rows) & (columns[None, :] < size),
    )


@triton.jit
def _inside(columns_I, SIZE_I: tl.constexpr, EVEN: tl.constexpr):
    """A mask that is constant, and so costs nothing, where tiles divide the inputs."""
    if EVEN:
        return tl.full(columns_I.shape, True, tl.int1)
    return columns_I < SIZE_I


@triton.jit
def _multiply_add(
    total_TO,
    weight_OI,
    x_ptr,
    x_stride,
    num_rows,
    columns_I,
    SIZE_I: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One row of x after the other times a tile of the weight."""
    wide_OI = weight_OI.to(tl.float32)
    for row in tl.static_range(ROWS):
        # Rows past the last one repeat it; they are not stored.
        places_I = x_ptr + (min(row, num_rows - 1) if ROWS > 1 else 0) * x_stride + columns_I
        x_I = tl.load(places_I, mask=_inside(columns_I, SIZE_I, EVEN), other=0.0)
        sum_O = tl.sum(wide_OI * x_I.to(tl.float32)[None, :], axis=1)
        if ROWS == 1:
            total_TO += sum_O[None, :]
        else:
            this_T = tl.arange(0, ROWS) == row
            total_TO += tl.where(this_T[:, None], sum_O[None, :], 0.0)
    return total_TO


@triton.jit
def _load_weight(places_OI, columns_I, SIZE_I: tl.constexpr, EVEN: tl.constexpr):
    inside_I = _inside(columns_I, SIZE_I, EVEN)
    return tl.load(places_OI, mask=inside_I[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["num_rows"])
def vector_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    x_stride,
    SIZE_I: tl.constexpr,
    SIZE_O: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_O outputs of at most ROWS rows, without tensor cores: the weight goes from memory to
    registers, a tile ahead of the arithmetic."""
    EVEN: tl.constexpr = SIZE_I % BLOCK_I == 0
    STEPS: tl.constexpr = (SIZE_I + BLOCK_I - 1) // BLOCK_I
    first_O = tl.program_id(0) * BLOCK_O
    rows_O = _weight_rows(first_O, SIZE_O, GATED, BLOCK_O)
    columns_I = tl.arange(0, BLOCK_I)
    places_OI = weight_ptr + rows_O[:, None] * SIZE_I + columns_I[None, :]
    weight_OI = _load_weight(places_OI, columns_I, SIZE_I, EVEN)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    total_TO = tl.zeros((ROWS, BLOCK_O), tl.float32)
    for _ in tl.static_range(STEPS - 1):
        places_OI += BLOCK_I
        next_OI = _load_weight(places_OI, columns_I + BLOCK_I, SIZE_I, EVEN)
        total_TO = _multiply_add(
            total_TO, weight_OI, x_ptr, x_stride, num_rows, columns_I, SIZE_I, EVEN, ROWS
        )
        columns_I += BLOCK_I
        weight_OI = next_OI
    total_TO = _multiply_add(
        total_TO, weight_OI, x_ptr, x_stride, num_rows, columns_I, SIZE_I, EVEN, ROWS
    )
    rows_T = tl.arange(0, ROWS)
    _finish(
        total_TO,
        bias_ptr,
        out_ptr,
        rows_T,
        first_O,
        num_rows,
        SIZE_O,
        GATED,
        HAS_BIAS,
        ROWS,
        BLOCK_O,
    )


@triton.jit
def _prefetch(weight_ptr, rows_O, first_I, SIZE_I: tl.constexpr, PREFETCH_I: tl.constexpr):
    """Ask the second-level cache for PREFETCH_I values of each row, 256 bytes for each thread."""
    pieces = first_I + tl.arange(0, PREFETCH_I // 128) * 128
    places = weight_ptr + rows_O[:, None] * SIZE_I + tl.minimum(pieces, SIZE_I - 8)[None, :]
    tl.inline_asm_elementwise(
        "ld.volatile.global.L2::256B.b32 $0, [$1];",
        "=r,l",
        [places],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _sum_parts(
    total_TO,
    parts_ptr,
    arrived_ptr,
    tile,
    part,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Store a part of a tile's sum. The last program to do so gets (the whole sum, True): all
    parts in their order, whoever came last."""
    inner = tl.arange(0, BLOCK_T)[:, None] * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    places_TO = parts_ptr + tile.to(tl.int64) * (SPLIT * BLOCK_T * BLOCK_O) + inner
    tl.store(places_TO + part * (BLOCK_T * BLOCK_O), total_TO)
    tl.debug_barrier()  # every thread's part is stored before it is counted
    last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        total_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        for other in tl.static_range(SPLIT):
            # Not through the first-level cache, which may hold what stood there before.
            total_TO += tl.load(places_TO + other * (BLOCK_T * BLOCK_O), cache_modifier=".cg")
        tl.store(arrived_ptr + tile, 0)  # for the next launch
    return total_TO, last


@triton.jit(do_not_specialize=["num_rows"])
def matrix_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrived_ptr,
    num_rows,
    x_stride,
    SIZE_I: tl.constexpr,
    SIZE_O: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFETCH_I: tl.constexpr,
    WIDE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_T rows by BLOCK_O outputs on tensor cores; with SPLIT each program sums a part of the
    inputs, and the last one adds the parts."""
    STEPS: tl.constexpr = (SIZE_I + BLOCK_I - 1) // BLOCK_I
    PART_I: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT * BLOCK_I
    EVEN: tl.constexpr = SIZE_I % BLOCK_I == 0
    # Neighbouring programs share the weight's rows.
    num_row_blocks = tl.cdiv(num_rows, BLOCK_T)
    tile = tl.program_id(0)
    first_O = tile // num_row_blocks * BLOCK_O
    rows_T = tile % num_row_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    rows_O = _weight_rows(first_O, SIZE_O, GATED, BLOCK_O)
    first_I = tl.program_id(1) * PART_I
    if DEPENDENT and PREFETCH_I > 0:
        _prefetch(weight_ptr, rows_O, first_I, SIZE_I, PREFETCH_I)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    columns_I = first_I + tl.arange(0, BLOCK_I)
    x_ptrs = x_ptr + rows_T[:, None].to(tl.int64) * x_stride + columns_I[None, :]
    weight_ptrs = weight_ptr + rows_O[None, :] * SIZE_I + columns_I[:, None]
    inside_T = rows_T < num_rows
    total_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for step in range(0, min(PART_I, SIZE_I - first_I), BLOCK_I):
        if EVEN:
            x_TI = tl.load(x_ptrs + step, mask=inside_T[:, None], other=0.0)
            weight_IO = tl.load(weight_ptrs + step)
        else:
            inside_I = columns_I < SIZE_I - step
            x_TI = tl.load(x_ptrs + step, mask=inside_T[:, None] & inside_I[None, :], other=0.0)
            weight_IO = tl.load(weight_ptrs + step, mask=inside_I[:, None], other=0.0)
        if WIDE:  # the interpreter's products of bfloat16 are not its values'
            x_TI, weight_IO = x_TI.to(tl.float32), weight_IO.to(tl.float32)
        total_TO = tl.dot(x_TI, weight_IO, total_TO)
    complete = True
    if SPLIT > 1:
        total_TO, complete = _sum_parts(
            total_TO, parts_ptr, arrived_ptr, tile, tl.program_id(1), SPLIT, BLOCK_T, BLOCK_O
        )
    if complete:
        _finish(
            total_TO,
            bias_ptr,
            out_ptr,
            rows_T,
            first_O,
            num_rows,
            SIZE_O,
            GATED,
            HAS_BIAS,
            BLOCK_T,
            BLOCK_O,
        )


def _rows_together(x_TI: Tensor) -> Tensor:
    return x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()


def _result(x_TI: Tensor, num_outputs: int, dtype: torch.dtype | None) -> Tensor:
    return torch.empty((x_TI.shape[0], num_outputs), dtype=dtype or x_TI.dtype, device=x_TI.device)


def vector(
    weight_OI: Tensor,
    bias_O: Tensor | None,
    *,
    gated: bool,
    dtype: torch.dtype | None,
    tile: Mapping[str, Any],
) -> LinearKernel:
    """A linear layer of 1 to `tile["ROWS"]` rows; results have `dtype`, or that of x."""
    size_O, size_I = weight_OI.shape
    grid = (triton.cdiv(size_O, tile["BLOCK_O"]),)
    num_outputs = size_O // 2 if gated else size_O
    constants = dict(
        SIZE_I=size_I,
        SIZE_O=size_O,
        GATED=gated,
        HAS_BIAS=bias_O is not None,
        ROWS=tile["ROWS"],
        BLOCK_O=tile["BLOCK_O"],
        BLOCK_I=tile["BLOCK_I"],
        num_warps=tile["num_warps"],
        **options(weight_OI.device),
    )
    bias = weight_OI if bias_O is None else bias_O

    def run(x_TI: Tensor) -> Tensor:
        x = _rows_together(x_TI)
        out = _result(x, num_outputs, dtype)
        vector_kernel[grid](x, weight_OI, bias, out, x.shape[0], x.stride(0), **constants)
        return out

    return run


def matrix(
    weight_OI: Tensor,
    bias_O: Tensor | None,
    *,
    gated: bool,
    dtype: torch.dtype | None,
    tile: Mapping[str, Any],
) -> LinearKernel:
    """A linear layer of 1 to `tile["max_rows"]` rows; results have `dtype`, or that of x."""
    size_O, size_I = weight_OI.shape
    block_T, block_O, split = tile["BLOCK_T"], tile["BLOCK_O"], tile["SPLIT"]
    tiles_O = triton.cdiv(size_O, block_O)
    num_outputs = size_O // 2 if gated else size_O
    constants = dict(
        SIZE_I=size_I,
        SIZE_O=size_O,
        GATED=gated,
        HAS_BIAS=bias_O is not None,
        BLOCK_T=block_T,
        BLOCK_O=block_O,
        BLOCK_I=tile["BLOCK_I"],
        SPLIT=split,
        PREFETCH_I=tile["PREFETCH_I"] if size_I % 128 == 0 else 0,
        WIDE=weight_OI.device.type == "cpu",
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        **options(weight_OI.device),
    )
    bias = weight_OI if bias_O is None else bias_O
    most_tiles = tiles_O * triton.cdiv(tile["max_rows"], block_T) if split > 1 else 0
    arrived = torch.zeros(most_tiles, dtype=torch.int32, device=weight_OI.device)

    def run(x_TI: Tensor) -> Tensor:
        x = _rows_together(x_TI)
        out = _result(x, num_outputs, dtype)
        tiles = tiles_O * triton.cdiv(x.shape[0], block_T)
        parts = x
        if split > 1:
            shape = (tiles, split, block_T, block_O)
            parts = torch.empty(shape, dtype=torch.float32, device=x.device)
        matrix_kernel[(tiles, split)](
            x, weight_OI, bias, out, parts, arrived, x.shape[0], x.stride(0), **constants
        )
        return out

    return run
