"""The kernel of linear layers over block-quantised weights, and its launch.

Each step of 128 inputs is one fp8 product, scaled and summed in float32: fp8 tensor cores keep too
few bits of longer sums (DeepSeek-V3, arXiv 2412.19437, 3.3.2). Rows come quantised, or are
quantised by each program as it reads them, which saves a launch where rows are few. The same input
gives the same bits. Knows nothing of which tile suits which shape
(core.devices.cuda.linear.triton_fp8). Shape legend: T rows, O rows of the weight, I inputs, C
blocks of 128 columns. With GATED rows of the weight are taken in pairs, one of the first half and
one of the second: silu(gate) * up of a pair is one output.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.gpu_tools.dependent_launch import let_successor_start, options, wait_for_predecessor
from core.gpu_tools.fp8_tile import quantize_tile
from core.interfaces.ops import LinearKernel
from core.interfaces.weights import BlockFp8
from core.ops.block_fp8 import BLOCK

QuantizeRows = Callable[[Tensor], tuple[Tensor, Tensor]]  # (T, I) -> values (T, I), scales (T, C)


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
def _prefetch(weight_ptr, rows_O, first_C, SIZE_I: tl.constexpr, PREFETCH_I: tl.constexpr):
    """Ask the second-level cache for PREFETCH_I values of each row, 256 bytes for each thread."""
    pieces = first_C * 128 + tl.arange(0, PREFETCH_I // 256) * 256
    places = weight_ptr + rows_O[:, None] * SIZE_I + tl.minimum(pieces, SIZE_I - 16)[None, :]
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
        out_ptr + rows_T[:, None] * size + columns[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=(rows_T[:, None] < num_rows) & (columns[None, :] < size),
    )


@triton.jit(do_not_specialize=["num_rows"])
def tile_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    bias_ptr,
    out_ptr,
    parts_ptr,
    arrived_ptr,
    num_rows,
    x_stride,
    SIZE_I: tl.constexpr,
    SIZE_O: tl.constexpr,
    QUANTIZED: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    SPLIT: tl.constexpr,
    TURNED: tl.constexpr,
    PREFETCH_I: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_T rows by BLOCK_O outputs; with SPLIT each program sums a part of the inputs, and the
    last one adds the parts. Without GATED the outputs lie in one block of the weight. TURNED has
    tensor cores take 64 outputs at once instead of 64 rows, which wastes nothing on few rows."""
    SCALES_I: tl.constexpr = (SIZE_I + 127) // 128
    PART_C: tl.constexpr = (SCALES_I + SPLIT - 1) // SPLIT
    EVEN: tl.constexpr = SIZE_I % 128 == 0
    # Neighbouring programs share the weight's rows.
    num_row_blocks = tl.cdiv(num_rows, BLOCK_T)
    tile = tl.program_id(0)
    first_O = tile // num_row_blocks * BLOCK_O
    rows_T = (tile % num_row_blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    rows_O = _weight_rows(first_O, SIZE_O, GATED, BLOCK_O)
    first_C = tl.program_id(1) * PART_C
    if DEPENDENT and PREFETCH_I > 0:
        _prefetch(weight_ptr, rows_O, first_C, SIZE_I, PREFETCH_I)
    let_successor_start(DEPENDENT)
    wait_for_predecessor(DEPENDENT)
    columns_I = tl.arange(0, 128)
    inside_T = rows_T < num_rows
    x_ptrs = x_ptr + rows_T[:, None] * x_stride + columns_I[None, :]
    weight_ptrs = weight_ptr + rows_O[None, :] * SIZE_I + columns_I[:, None]
    total_TO = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for block in range(first_C, tl.minimum(first_C + PART_C, SCALES_I)):
        step = block * 128
        if EVEN:
            x_TI = tl.load(x_ptrs + step, mask=inside_T[:, None], other=0.0)
            weight_IO = tl.load(weight_ptrs + step)
        else:
            inside_I = columns_I < SIZE_I - step
            x_TI = tl.load(x_ptrs + step, mask=inside_T[:, None] & inside_I[None, :], other=0.0)
            weight_IO = tl.load(weight_ptrs + step, mask=inside_I[:, None], other=0.0)
        if QUANTIZED:
            scale_T = tl.load(x_scales_ptr + rows_T * SCALES_I + block, mask=inside_T, other=0.0)
        else:
            x_TI, scale_T = quantize_tile(x_TI)
        if TURNED:
            product_TO = tl.trans(tl.dot(tl.trans(weight_IO), tl.trans(x_TI)))
        else:
            product_TO = tl.dot(x_TI, weight_IO)
        if GATED:
            scale_O = tl.load(weight_scales_ptr + rows_O // 128 * SCALES_I + block)
            total_TO += product_TO * scale_T[:, None] * scale_O[None, :]
        else:
            scale = tl.load(weight_scales_ptr + first_O // 128 * SCALES_I + block)
            total_TO += product_TO * (scale_T * scale)[:, None]
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


def tiles(
    weight: BlockFp8,
    bias_O: Tensor | None,
    *,
    gated: bool,
    quantize_rows: QuantizeRows,
    tile: Mapping[str, Any],
) -> LinearKernel:
    """A linear layer of 1 to `tile["max_rows"]` rows (of any number with a SPLIT of 1); results
    have the dtype of x."""
    values_OI, scales = weight.values_OI, weight.scales
    size_O, size_I = values_OI.shape
    block_T, block_O, split = tile["BLOCK_T"], tile["BLOCK_O"], tile["SPLIT"]
    quantized = bool(tile["QUANTIZED"])
    assert BLOCK % block_O == 0
    tiles_O = triton.cdiv(size_O, block_O)
    num_outputs = size_O // 2 if gated else size_O
    constants = dict(
        SIZE_I=size_I,
        SIZE_O=size_O,
        QUANTIZED=quantized,
        GATED=gated,
        HAS_BIAS=bias_O is not None,
        BLOCK_T=block_T,
        BLOCK_O=block_O,
        SPLIT=split,
        TURNED=bool(tile["TURNED"]),
        PREFETCH_I=tile.get("PREFETCH_I", 0) if size_I % 128 == 0 else 0,
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
        **options(values_OI.device),
    )
    bias = scales if bias_O is None else bias_O
    most_tiles = tiles_O * triton.cdiv(tile["max_rows"], block_T) if split > 1 else 1
    arrived = torch.zeros(most_tiles, dtype=torch.int32, device=values_OI.device)

    def run(x_TI: Tensor) -> Tensor:
        x = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
        num_rows = x.shape[0]
        out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
        x, x_scales = quantize_rows(x) if quantized else (x, scales)
        num_tiles = tiles_O * triton.cdiv(num_rows, block_T)
        parts = scales
        if split > 1:
            shape = (num_tiles, split, block_T, block_O)
            parts = torch.empty(shape, dtype=torch.float32, device=x.device)
        tile_kernel[(num_tiles, split)](
            x,
            x_scales,
            values_OI,
            scales,
            bias,
            out,
            parts,
            arrived,
            num_rows,
            x.stride(0),
            **constants,
        )
        return out

    return run
