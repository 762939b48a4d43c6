"""Grouped products of mixtures of experts in block-scaled fp8: gate and up with silu, and down.

Rows are fp8 with a scale for each 128 columns, and so is what lies between the two products. Knows
which sorted places belong to which expert (`ExpertTiles`), and not how rows were routed. Which tile
sizes serve how many pairs is data, in core/gpu_tools/tuned/moe_fp8.json. Each step of 128 inputs is
one fp8 product, scaled and summed in float32: fp8 tensor cores keep too few bits of longer sums
(DeepSeek-V3, arXiv 2412.19437, 3.3.2). Shape legend: P places, L local experts, E hidden size, I
middle size, M places of a tile, N and D columns of a product's result and operands.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from core.devices.cuda.experts.triton_expert_tiles import (
    choose_tiles,
    has_tma,
    num_programs,
    num_tiles,
    tile_at,
    usual_block_M,
)
from core.devices.cuda.linear.triton_fp8 import quantize_rows
from core.gpu_tools.dependent_launch import let_successor_start, options, wait_for_predecessor
from core.gpu_tools.tuning import choices
from core.interfaces.moe_a2a import Dispatched
from core.interfaces.weights import BlockFp8
from core.ops.block_fp8 import BLOCK, FP8, num_blocks
from core.ops.expert_tiles import ExpertRows, ExpertTiles, ProductTile

_TMA_ALIGNMENT = 16  # bytes, of addresses and strides


@triton.jit
def _weight_tile(
    weight,
    row,
    first_N,
    step,
    SIZE_D: tl.constexpr,
    SIZE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """128 inputs of the rows from `first_N` on, of SIZE_N rows that begin at `row` of all experts'
    stacked weight. Rows past the end are others; their results are not stored."""
    if TMA:
        return weight.load([(row + first_N).to(tl.int32), step])
    else:
        rows_N = first_N + tl.arange(0, BLOCK_N)
        if SIZE_N % BLOCK_N != 0:
            rows_N = rows_N % SIZE_N
        rows_N = row + rows_N
        columns_D = tl.arange(0, 128)
        ptrs_ND = weight + rows_N[:, None] * SIZE_D + columns_D[None, :] + step
        if SIZE_D % 128 == 0:
            return tl.load(ptrs_ND)
        else:
            return tl.load(ptrs_ND, mask=(columns_D < SIZE_D - step)[None, :], other=0.0)


@triton.jit
def _product(x_MD, weight_ND, SWAP: tl.constexpr):
    """(N, M) with SWAP, else (M, N)."""
    if SWAP:
        return tl.dot(weight_ND, tl.trans(x_MD))
    else:
        return tl.dot(x_MD, tl.trans(weight_ND))


@triton.jit
def _scaled(product, scale_M, SWAP: tl.constexpr):
    if SWAP:
        return product * scale_M[None, :]
    else:
        return product * scale_M[:, None]


@triton.jit(
    do_not_specialize=["max_tiles", "scale_expert_stride"],
    do_not_specialize_on_alignment=["source_ptr", "tiles_ptr"],
)
def experts_fp8_kernel(
    x_ptr,
    x_blocks,
    x_scales_ptr,
    weight,
    weight_scales_ptr,
    out_ptr,
    out_scales_ptr,
    source_ptr,
    tiles_ptr,
    max_tiles,
    scale_expert_stride,
    scale_row_stride,
    scale_column_stride,
    SIZE_D: tl.constexpr,
    SIZE_N: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    GATHER: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED_BY: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """x @ W.T of each expert's rows; with GATED silu(x @ W[:N].T) * (x @ W[N:].T), stored in fp8
    with a scale for each 128 columns: BLOCK_N is 128 then. With GATHER place p reads row source[p],
    else row p // SHARED_BY. With TMA the weights are a descriptor, and `x_blocks`, where places are
    sorted rows, is one of tiles of x, of which rows past the end are other experts'. With SWAP the
    weights are the left operand, of which tensor cores take 64 rows at once: few rows of x waste
    nothing.
    """
    ROWS: tl.constexpr = 2 * SIZE_N if GATED else SIZE_N
    NUM_COLUMNS: tl.constexpr = (SIZE_N + BLOCK_N - 1) // BLOCK_N
    SCALES_D: tl.constexpr = (SIZE_D + 127) // 128
    SCALES_N: tl.constexpr = (SIZE_N + 127) // 128
    SHAPE_0: tl.constexpr = BLOCK_N if SWAP else BLOCK_M
    SHAPE_1: tl.constexpr = BLOCK_M if SWAP else BLOCK_N
    X_TILES: tl.constexpr = TMA and not GATHER and TOP_K == 0
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    work = num_tiles(tiles_ptr, max_tiles, TOP_K) * NUM_COLUMNS
    columns_D = tl.arange(0, 128)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        expert, start, last, places_M, inside_M = tile_at(
            tiles_ptr, max_tiles, item // NUM_COLUMNS, TOP_K, BLOCK_M
        )
        expert = expert.to(tl.int64)
        # Past the end come values of whatever lies there, or of the last row again, with its scale;
        # their results are not stored.
        read_M = tl.where(inside_M, places_M, last) // SHARED_BY
        if GATHER:
            read_M = tl.load(source_ptr + read_M)
        read_M = read_M.to(tl.int64)
        first_N = item % NUM_COLUMNS * BLOCK_N
        row = expert * ROWS
        x_ptrs = x_ptr + read_M[:, None] * SIZE_D + columns_D[None, :]
        scale_ptrs = x_scales_ptr + expert * scale_expert_stride + read_M * scale_row_stride
        block_ptr = weight_scales_ptr + (
            expert * ((ROWS + 127) // 128 * SCALES_D) + first_N // 128 * SCALES_D
        )
        first = tl.zeros((SHAPE_0, SHAPE_1), tl.float32)
        second = tl.zeros((SHAPE_0, SHAPE_1), tl.float32)
        num_steps = SCALES_D
        if TOP_K > 0:
            num_steps = tl.where(tl.max(inside_M.to(tl.int32), axis=0) > 0, SCALES_D, 0)
        for block in range(num_steps):
            step = block * 128
            if X_TILES:
                x_MD = x_blocks.load([start, step])
            elif SIZE_D % 128 == 0:
                x_MD = tl.load(x_ptrs + step)
            else:
                x_MD = tl.load(x_ptrs + step, mask=(columns_D < SIZE_D - step)[None, :], other=0.0)
            scale_M = tl.load(scale_ptrs + block * scale_column_stride)
            weight_ND = _weight_tile(weight, row, first_N, step, SIZE_D, SIZE_N, BLOCK_N, TMA)
            scale = tl.load(block_ptr + block)
            first += _scaled(_product(x_MD, weight_ND, SWAP), scale_M * scale, SWAP)
            if GATED:
                weight_ND = _weight_tile(
                    weight, row + SIZE_N, first_N, step, SIZE_D, SIZE_N, BLOCK_N, TMA
                )
                scale = tl.load(block_ptr + SCALES_N * SCALES_D + block)
                second += _scaled(_product(x_MD, weight_ND, SWAP), scale_M * scale, SWAP)
        if GATED:
            first = first / (1.0 + tl.exp(-first)) * second
        out_MN = tl.trans(first) if SWAP else first
        places_M = places_M.to(tl.int64)
        columns_N = first_N + tl.arange(0, BLOCK_N)
        if GATED:
            largest_M = tl.max(tl.abs(out_MN), axis=1)
            out_scale_M = tl.where(largest_M > 0.0, largest_M / 448.0, 1.0)
            tl.store(out_scales_ptr + places_M * SCALES_N + first_N // 128, out_scale_M, inside_M)
            out_MN = out_MN / out_scale_M[:, None]
        tl.store(
            out_ptr + places_M[:, None] * SIZE_N + columns_N[None, :],
            out_MN.to(out_ptr.dtype.element_ty),
            mask=inside_M[:, None] & (columns_N[None, :] < SIZE_N),
        )


class Fp8Experts:
    """Both products of all local experts; sums in float32. Nothing waits for the device."""

    def __init__(self, gate_up_L2IE: BlockFp8, down_LEI: BlockFp8) -> None:
        # The scales of up follow those of gate: a block of both would belong to neither.
        assert gate_up_L2IE.values_OI.shape[1] % (2 * BLOCK) == 0
        self._gate_up_L2IE, self._down_LEI = gate_up_L2IE, down_LEI
        num_experts, size_E, size_I = down_LEI.values_OI.shape
        self._found = choices(
            "moe_fp8",
            down_LEI.values_OI.device,
            experts=num_experts,
            hidden=size_E,
            middle=size_I,
        )

    def block_M(self, num_places: int, num_experts: int) -> int:
        """Places of one tile, for at most so many pairs of row and local expert."""
        choice = choose_tiles(self._found, num_places)
        if choice is not None:
            return int(choice["BLOCK_M"])
        return usual_block_M(num_places, num_experts, largest=64)

    def rows(self, dispatched: Dispatched) -> ExpertRows:
        """The received rows, quantised here if they did not come so."""
        hidden, scales = dispatched.hidden, dispatched.scales
        values_PE = hidden.flatten(0, -2)
        if scales is None:
            values_PE, scales = quantize_rows(values_PE.contiguous())
        return ExpertRows(values_PE, scales, None, values_PE.shape[0])

    def operands(self, dispatched: Dispatched) -> tuple[Tensor, Tensor]:
        """Rows as the first product reads them, quantised once each, and their scales."""
        if dispatched.scales is not None:
            return dispatched.hidden, dispatched.scales
        return quantize_rows(dispatched.hidden)

    def gate_up(self, rows: ExpertRows, tiles: ExpertTiles) -> ExpertRows:
        """silu(x @ gate.T) * (x @ up.T): (P, I)."""
        size_I = self._down_LEI.values_OI.shape[2]
        device = rows.values.device
        middle_PI = torch.empty((rows.num_places, size_I), dtype=FP8, device=device)
        shape = (rows.num_places, num_blocks(size_I))
        scales = torch.empty(shape, dtype=torch.float32, device=device)
        tile = self._tile(rows.num_places, tiles.block_M, gated=True)
        multiply(rows, self._gate_up_L2IE, tiles, middle_PI, scales, tile)
        return ExpertRows(middle_PI, scales, None, rows.num_places)

    def down(self, middle: ExpertRows, tiles: ExpertTiles, out_PE: Tensor) -> None:
        """middle @ down.T, into `out_PE`."""
        tile = self._tile(middle.num_places, tiles.block_M, gated=False)
        multiply(middle, self._down_LEI, tiles, out_PE, None, tile)

    def _tile(self, num_places: int, block_M: int, *, gated: bool) -> ProductTile:
        choice = choose_tiles(self._found, num_places)
        if choice is not None and choice["BLOCK_M"] == block_M:
            return ProductTile(**choice["gate_up" if gated else "down"])
        return usual_tile(block_M, gated=gated)


def usual_tile(block_M: int, *, gated: bool) -> ProductTile:
    """For shapes and devices that no table speaks of."""
    if block_M >= 64:
        return ProductTile(BLOCK, BLOCK, 8, 3, programs=1)
    return ProductTile(BLOCK, BLOCK, 4, 3 if gated else 4, swap=True)


def multiply(
    rows: ExpertRows,
    weight: BlockFp8,
    tiles: ExpertTiles,
    out_PN: Tensor,
    out_scales: Tensor | None,
    tile: ProductTile,
) -> None:
    """One product of every expert; gated where the result's scales are asked for."""
    assert rows.scales is not None
    assert rows.values.is_contiguous()
    gated, values = out_scales is not None, weight.values_OI
    assert tile.block_D == BLOCK
    assert BLOCK % tile.block_N == 0
    assert tile.block_N == BLOCK or not gated
    if tiles.max_tiles == 0:
        return
    num_experts, num_rows, size_D = values.shape
    size_N, device = out_PN.shape[1], out_PN.device
    tma = has_tma(device) and size_D % _TMA_ALIGNMENT == 0
    source: Tensor | TensorDescriptor = values
    x_blocks: Tensor | TensorDescriptor = rows.values
    if tma:
        shape = [num_experts * num_rows, size_D]
        source = TensorDescriptor(values, shape, [size_D, 1], [tile.block_N, BLOCK])
        if rows.source_P is None and not tiles.top_k:
            x_blocks = TensorDescriptor.from_tensor(rows.values, [tiles.block_M, BLOCK])
    programs = tiles.max_tiles * triton.cdiv(size_N, tile.block_N)
    if tile.programs or device.type != "cuda":
        programs = min(programs, num_programs(device, tile.programs))
    experts_fp8_kernel[(programs,)](
        rows.values,
        x_blocks,
        rows.scales,
        source,
        weight.scales,
        out_PN,
        out_PN if out_scales is None else out_scales,
        tiles.tiles if rows.source_P is None else rows.source_P,
        tiles.tiles,
        tiles.max_tiles,
        *_scale_strides(rows.scales),
        SIZE_D=size_D,
        SIZE_N=size_N,
        GATED=gated,
        BLOCK_M=tiles.block_M,
        BLOCK_N=tile.block_N,
        SWAP=tile.swap,
        TMA=tma,
        GATHER=rows.source_P is not None,
        TOP_K=tiles.top_k,
        SHARED_BY=rows.shared_by,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **options(device),
    )


def _scale_strides(scales: Tensor) -> tuple[int, int, int]:
    """By expert (beyond its rows), row and column."""
    if scales.dim() == 2:
        return (0, scales.stride(0), scales.stride(1))
    # DeepEP lays scales out by columns, so that they are no matrix.
    by_expert, by_row, by_column = scales.stride()
    return (by_expert - scales.shape[1] * by_row, by_row, by_column)
