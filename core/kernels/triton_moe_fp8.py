"""Grouped products of mixtures of experts in block-scaled fp8: gate and up with silu, and down.

Rows are fp8 with a scale for each 128 columns, and so is what lies between the two products. Knows
which sorted places belong to which expert (`ExpertTiles`), and not how rows were routed. Shape
legend: P places, L local experts, E hidden size, I middle size, M places of a tile, N and D columns
of a product's result and operands.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.interfaces.moe_a2a import Dispatched
from core.interfaces.weights import BlockFp8
from core.kernels.block_fp8 import BLOCK, FP8, num_blocks
from core.kernels.expert_tiles import ExpertRows, ExpertTiles
from core.kernels.triton_expert_tiles import usual_block_M
from core.kernels.triton_fp8 import quantize_rows

_PROGRAMS_OF_A_PROCESSOR = 2
_INTERPRETED_PROGRAMS = 2


@triton.jit
def _product(
    total_MN,
    x_MD,
    weight_ptrs_DN,
    weight_mask_DN,
    x_scale_M,
    weight_scale_ptr,
    EVEN: tl.constexpr,
):
    """Add one step of a product to its total, by the scales of rows and of the weight's block."""
    if EVEN:
        weight_DN = tl.load(weight_ptrs_DN)
    else:
        weight_DN = tl.load(weight_ptrs_DN, mask=weight_mask_DN, other=0.0)
    scale_M = x_scale_M * tl.load(weight_scale_ptr)
    total_MN += tl.dot(x_MD, weight_DN) * scale_M[:, None]
    return total_MN


@triton.jit(
    do_not_specialize=["max_tiles", "scale_expert_stride"],
    do_not_specialize_on_alignment=["tiles_ptr"],
)
def experts_kernel(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    weight_scales_ptr,
    out_ptr,
    out_scales_ptr,
    tiles_ptr,
    max_tiles,
    x_stride,
    scale_expert_stride,
    scale_row_stride,
    scale_column_stride,
    SIZE_D: tl.constexpr,
    SIZE_N: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x @ W.T of each expert's rows; with GATED silu(x @ W[:N].T) * (x @ W[N:].T).

    Scales are of each 128 columns (x) and 128 x 128 values (weight): BLOCK is 128. The gated result
    is stored like such an x.
    """
    EVEN: tl.constexpr = SIZE_D % BLOCK == 0
    ROWS: tl.constexpr = 2 * SIZE_N if GATED else SIZE_N
    NUM_COLUMNS: tl.constexpr = (SIZE_N + BLOCK - 1) // BLOCK
    SCALES_D: tl.constexpr = (SIZE_D + 127) // 128
    SCALES_N: tl.constexpr = (SIZE_N + 127) // 128
    work = tl.load(tiles_ptr) * NUM_COLUMNS
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        tile_ptr = tiles_ptr + 1 + item // NUM_COLUMNS
        expert = tl.load(tile_ptr).to(tl.int64)
        rows_M = tl.load(tile_ptr + max_tiles).to(tl.int64) + tl.arange(0, BLOCK_M)
        inside_M = rows_M < tl.load(tile_ptr + 2 * max_tiles)
        first_N = item % NUM_COLUMNS * BLOCK
        columns_N = first_N + tl.arange(0, BLOCK)
        columns_D = tl.arange(0, BLOCK)
        x_ptrs = x_ptr + rows_M[:, None] * x_stride + columns_D[None, :]
        # Columns past the end repeat others; their results are not stored.
        weight_ptrs = weight_ptr + expert * (ROWS * SIZE_D)
        weight_ptrs += (columns_N % SIZE_N)[None, :] * SIZE_D + columns_D[:, None]
        scale_ptrs = x_scales_ptr + expert * scale_expert_stride + rows_M * scale_row_stride
        block_ptr = weight_scales_ptr + expert * ((ROWS + 127) // 128 * SCALES_D)
        block_ptr += first_N // 128 * SCALES_D
        first_MN = tl.zeros((BLOCK_M, BLOCK), tl.float32)
        second_MN = tl.zeros((BLOCK_M, BLOCK), tl.float32)
        for step in range(0, SIZE_D, BLOCK):
            inside_D = columns_D < SIZE_D - step
            x_mask = inside_M[:, None] if EVEN else inside_M[:, None] & inside_D[None, :]
            x_MD = tl.load(x_ptrs + step, mask=x_mask, other=0.0)
            places_M = scale_ptrs + step // BLOCK * scale_column_stride
            x_scale_M = tl.load(places_M, mask=inside_M, other=0.0)
            mask_DN = inside_D[:, None]
            block = block_ptr + step // 128
            first_MN = _product(first_MN, x_MD, weight_ptrs + step, mask_DN, x_scale_M, block, EVEN)
            if GATED:
                second_MN = _product(
                    second_MN,
                    x_MD,
                    weight_ptrs + SIZE_N * SIZE_D + step,
                    mask_DN,
                    x_scale_M,
                    block + SIZE_N // 128 * SCALES_D,
                    EVEN,
                )
        if GATED:
            first_MN = first_MN / (1.0 + tl.exp(-first_MN)) * second_MN
            largest_M = tl.max(tl.where(columns_N[None, :] < SIZE_N, tl.abs(first_MN), 0.0), axis=1)
            out_scale_M = tl.where(largest_M > 0.0, largest_M / 448.0, 1.0)
            tl.store(out_scales_ptr + rows_M * SCALES_N + first_N // 128, out_scale_M, inside_M)
            first_MN = first_MN / out_scale_M[:, None]
        tl.store(
            out_ptr + rows_M[:, None] * SIZE_N + columns_N[None, :],
            first_MN.to(out_ptr.dtype.element_ty),
            mask=inside_M[:, None] & (columns_N[None, :] < SIZE_N),
        )


class Fp8Experts:
    """Both products of all local experts; sums in float32. Nothing waits for the device."""

    def __init__(self, gate_up_L2IE: BlockFp8, down_LEI: BlockFp8) -> None:
        # The scales of up follow those of gate: a block of both would belong to neither.
        assert gate_up_L2IE.values_OI.shape[1] % (2 * BLOCK) == 0
        self._gate_up_L2IE, self._down_LEI = gate_up_L2IE, down_LEI

    def block_M(self, num_places: int, num_experts: int) -> int:
        """Places of one tile."""
        return usual_block_M(num_places, num_experts, largest=64)

    def rows(self, dispatched: Dispatched) -> ExpertRows:
        """The received rows, quantised here if they did not come so."""
        hidden, scales = dispatched.hidden, dispatched.scales
        values_PE = hidden.flatten(0, -2)
        if scales is None:
            values_PE, scales = quantize_rows(values_PE.contiguous())
        return ExpertRows(values_PE, scales, None, values_PE.shape[0])

    def gate_up(self, rows: ExpertRows, tiles: ExpertTiles) -> ExpertRows:
        """silu(x @ gate.T) * (x @ up.T): (P, I)."""
        size_I = self._down_LEI.values_OI.shape[2]
        device = rows.values.device
        middle_PI = torch.empty((rows.num_places, size_I), dtype=FP8, device=device)
        shape = (rows.num_places, num_blocks(size_I))
        scales = torch.empty(shape, dtype=torch.float32, device=device)
        _multiply(rows, self._gate_up_L2IE, tiles, middle_PI, scales)
        return ExpertRows(middle_PI, scales, None, rows.num_places)

    def down(self, middle: ExpertRows, tiles: ExpertTiles, out_PE: Tensor) -> None:
        """middle @ down.T, into `out_PE`."""
        _multiply(middle, self._down_LEI, tiles, out_PE, None)


def _multiply(
    rows: ExpertRows,
    weight: BlockFp8,
    tiles: ExpertTiles,
    out_PN: Tensor,
    out_scales: Tensor | None,
) -> None:
    """One product of every expert; gated where the result's scales are asked for."""
    assert rows.scales is not None
    assert rows.source_P is None
    size_N, device = out_PN.shape[1], out_PN.device
    programs = min(_num_programs(device), tiles.max_tiles * triton.cdiv(size_N, BLOCK))
    experts_kernel[(programs,)](
        rows.values,
        rows.scales,
        weight.values_OI,
        weight.scales,
        out_PN,
        out_PN if out_scales is None else out_scales,
        tiles.tiles,
        tiles.max_tiles,
        rows.values.stride(0),
        *_scale_strides(rows.scales),
        SIZE_D=weight.values_OI.shape[2],
        SIZE_N=size_N,
        GATED=out_scales is not None,
        BLOCK_M=tiles.block_M,
        BLOCK=BLOCK,
        num_warps=8 if tiles.block_M >= 64 else 4,
        num_stages=3,
    )


def _scale_strides(scales: Tensor) -> tuple[int, int, int]:
    """By expert (beyond its rows), row and column."""
    if scales.dim() == 2:
        return (0, scales.stride(0), scales.stride(1))
    # DeepEP lays scales out by columns, so that they are no matrix.
    by_expert, by_row, by_column = scales.stride()
    return (by_expert - scales.shape[1] * by_row, by_row, by_column)


@lru_cache(maxsize=16)  # the driver's answer takes microseconds, and never changes
def _num_programs(device: torch.device) -> int:
    """Programs that run at the same time."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return int(processors) * _PROGRAMS_OF_A_PROCESSOR
