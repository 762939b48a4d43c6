"""Grouped products of block-scaled fp8 experts with many rows on Hopper: in Gluon.

It does what core.kernels.triton_moe_fp8 does, for rows that lie in the order of their places, in
tiles of 128 rows by two tiles of 128 weight rows: the gate's and what it multiplies, or neighbours.
A warp brings in tiles by the copy engine, as far ahead as there is room; two warpgroups, which wait
for nothing but those tiles, each multiply half of the rows. Products of 128 inputs are scaled and
summed in float32 by one warpgroup while tensor cores work for the other. A fixed number of programs
take tiles in turn, neighbours the same rows.

Knows nothing of which kernel suits how many rows (core.kernels.triton_moe_fp8). Imported only where
a Hopper GPU is: Gluon kernels run in no interpreter. Shape legend: see core.kernels.triton_moe_fp8;
M rows of a half, N rows of a weight's tile, D inputs of a step.
"""

# Kernels are written in Gluon, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from core.interfaces.weights import BlockFp8
from core.kernels.block_fp8 import BLOCK
from core.kernels.dependent_launch import options
from core.kernels.expert_tiles import ExpertRows, ExpertTiles
from core.kernels.gluon_common import (
    let_successor_start,
    release,
    wait_for_predecessor,
    warps_barrier,
)

HALF_ROWS = 64
ROWS = 2 * HALF_ROWS  # of a tile
_STAGES_USED = 4

_M = gl.constexpr(HALF_ROWS)
_N = gl.constexpr(BLOCK)
_D = gl.constexpr(BLOCK)
_STAGES = gl.constexpr(_STAGES_USED)
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
_SHARED = gl.constexpr(SHARED)
_SUMS = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
)
_STORED_8 = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
_STORED_16 = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def _copy_tiles(
    x_blocks, weight_blocks, x_2SMD, weight_2SND, full_S, free_S, tiles_ptr, max_tiles,
    SIZE_D: gl.constexpr, SIZE_N: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """What all tiles of this program read, in the order in which it is read."""
    NUM_N: gl.constexpr = SIZE_N // _N if GATED else SIZE_N // (2 * _N)
    count = 0  # of steps so far: buffers take turns
    for item in range(gl.program_id(0), gl.load(tiles_ptr) * NUM_N, gl.num_programs(0)):
        tile_ptr = tiles_ptr + 1 + item // NUM_N
        row = gl.load(tile_ptr + max_tiles)
        weight_row = gl.load(tile_ptr) * (2 * SIZE_N if GATED else SIZE_N)
        weight_row += item % NUM_N * (_N if GATED else 2 * _N)
        for step in range(0, SIZE_D, _D):
            place = count % _STAGES
            mbarrier.wait(free_S.index(place), (count // _STAGES & 1) ^ 1)
            full = full_S.index(place)
            mbarrier.expect(full, 2 * (_M + _N) * _D)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    x_blocks, [row + half * _M, step], full, x_2SMD.index(place * 2 + half)
                )
            for part in gl.static_range(2):
                part_row = weight_row + part * (SIZE_N if GATED else _N)
                tma.async_copy_global_to_shared(
                    weight_blocks, [part_row, step], full, weight_2SND.index(place * 2 + part)
                )
            count += 1


@gluon.jit
def _store_gated(gate_MN, up_MN, rows_M, end, block, out_ptr, out_scales_ptr, SIZE_N: gl.constexpr):
    """silu(gate) * up in fp8, with a scale for each row of 128 columns."""
    SCALES_N: gl.constexpr = SIZE_N // _N
    result_MN = gate_MN / (1.0 + gl.exp(-gate_MN)) * up_MN
    largest_M = gl.max(gl.abs(result_MN), axis=1)
    scale_M = gl.where(largest_M > 0.0, largest_M / 448.0, 1.0)
    scale_places_M = rows_M.to(gl.int64) * SCALES_N + block
    gl.store(out_scales_ptr + scale_places_M, scale_M, mask=rows_M < end)
    stored_MN = gl.convert_layout((result_MN / scale_M[:, None]).to(gl.float8e4nv), _STORED_8)
    rows_M = gl.convert_layout(rows_M, gl.SliceLayout(1, _STORED_8))
    columns_N = block * _N + gl.arange(0, _N, layout=gl.SliceLayout(0, _STORED_8))
    places_MN = rows_M.to(gl.int64)[:, None] * SIZE_N + columns_N[None, :]
    gl.store(out_ptr + places_MN, stored_MN, mask=(rows_M < end)[:, None])


@gluon.jit
def _store_plain(sums_MN, rows_M, end, block, out_ptr, SIZE_N: gl.constexpr):
    stored_MN = gl.convert_layout(sums_MN.to(gl.bfloat16), _STORED_16)
    rows_M = gl.convert_layout(rows_M, gl.SliceLayout(1, _STORED_16))
    columns_N = block * _N + gl.arange(0, _N, layout=gl.SliceLayout(0, _STORED_16))
    places_MN = rows_M.to(gl.int64)[:, None] * SIZE_N + columns_N[None, :]
    gl.store(out_ptr + places_MN, stored_MN, mask=(rows_M < end)[:, None])


@gluon.jit
def _multiply_half(
    half: gl.constexpr, x_2SMD, weight_2SND, full_S, free_S, x_scales_ptr, weight_scales_ptr,
    out_ptr, out_scales_ptr, tiles_ptr, max_tiles, scale_row_stride, scale_column_stride,
    SIZE_D: gl.constexpr, SIZE_N: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Half of the rows of all tiles of this program."""
    NUM_N: gl.constexpr = SIZE_N // _N if GATED else SIZE_N // (2 * _N)
    STEPS: gl.constexpr = SIZE_D // _D
    BLOCKS_N: gl.constexpr = 2 * SIZE_N // _N if GATED else SIZE_N // _N
    PARTS_APART: gl.constexpr = SIZE_N // _N if GATED else 1
    own_M = half * _M + gl.arange(0, _M, layout=gl.SliceLayout(1, _SUMS))
    none_MN = gl.zeros([_M, _N], gl.float32, _SUMS)
    count = 0
    for item in range(gl.program_id(0), gl.load(tiles_ptr) * NUM_N, gl.num_programs(0)):
        tile_ptr = tiles_ptr + 1 + item // NUM_N
        expert = gl.load(tile_ptr)
        rows_M = gl.load(tile_ptr + max_tiles) + own_M
        end = gl.load(tile_ptr + 2 * max_tiles)
        # Past the end come other experts' rows; their results are not stored.
        read_M = gl.minimum(rows_M, end - 1)
        scale_ptrs_M = x_scales_ptr + read_M.to(gl.int64) * scale_row_stride
        block = item % NUM_N * (1 if GATED else 2)
        first_ptr = weight_scales_ptr + (expert * BLOCKS_N + block) * STEPS
        second_ptr = first_ptr + PARTS_APART * STEPS
        first_MN = none_MN
        second_MN = none_MN
        product_MN = none_MN
        scale_M = gl.load(scale_ptrs_M)
        first_scale = gl.load(first_ptr)
        second_scale = gl.load(second_ptr)
        for step in range(STEPS):
            place = count % _STAGES
            mbarrier.wait(full_S.index(place), count // _STAGES & 1)
            x_MD = x_2SMD.index(place * 2 + half)
            weight_DN = weight_2SND.index(place * 2).permute((1, 0))
            product = warpgroup_mma(x_MD, weight_DN, product_MN, use_acc=False, is_async=True)
            # Scales of the next step are on their way meanwhile.
            later = gl.minimum(step + 1, STEPS - 1)
            next_scale_M = gl.load(scale_ptrs_M + later * scale_column_stride)
            next_first_scale = gl.load(first_ptr + later)
            next_second_scale = gl.load(second_ptr + later)
            product_MN = warpgroup_mma_wait(0, deps=[product])
            first_MN += product_MN * (scale_M * first_scale)[:, None]
            weight_DN = weight_2SND.index(place * 2 + 1).permute((1, 0))
            product = warpgroup_mma(x_MD, weight_DN, product_MN, use_acc=False, is_async=True)
            product_MN = warpgroup_mma_wait(0, deps=[product])
            release(free_S.index(place))
            second_MN += product_MN * (scale_M * second_scale)[:, None]
            scale_M = next_scale_M
            first_scale = next_first_scale
            second_scale = next_second_scale
            count += 1
        if GATED:
            _store_gated(first_MN, second_MN, rows_M, end, block, out_ptr, out_scales_ptr, SIZE_N)
        else:
            _store_plain(first_MN, rows_M, end, block, out_ptr, SIZE_N)
            _store_plain(second_MN, rows_M, end, block + 1, out_ptr, SIZE_N)


@gluon.jit
def _multiply_first_half(
    x_2SMD, weight_2SND, full_S, free_S, x_scales_ptr, weight_scales_ptr, out_ptr, out_scales_ptr,
    tiles_ptr, max_tiles, scale_row_stride, scale_column_stride, SIZE_D: gl.constexpr,
    SIZE_N: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The first one, as a function of its own: such is what warps are given to do."""
    _multiply_half(
        0, x_2SMD, weight_2SND, full_S, free_S, x_scales_ptr, weight_scales_ptr, out_ptr,
        out_scales_ptr, tiles_ptr, max_tiles, scale_row_stride, scale_column_stride, SIZE_D, SIZE_N,
        GATED,
    )  # fmt: skip


@gluon.jit
def _multiply_second_half(
    x_2SMD, weight_2SND, full_S, free_S, x_scales_ptr, weight_scales_ptr, out_ptr, out_scales_ptr,
    tiles_ptr, max_tiles, scale_row_stride, scale_column_stride, SIZE_D: gl.constexpr,
    SIZE_N: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The second one, as a function of its own: such is what warps are given to do."""
    _multiply_half(
        1, x_2SMD, weight_2SND, full_S, free_S, x_scales_ptr, weight_scales_ptr, out_ptr,
        out_scales_ptr, tiles_ptr, max_tiles, scale_row_stride, scale_column_stride, SIZE_D, SIZE_N,
        GATED,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=["max_tiles", "scale_row_stride", "scale_column_stride"],
    do_not_specialize_on_alignment=["tiles_ptr"],
)
def many_rows_kernel(
    x_blocks,
    weight_blocks,
    x_scales_ptr,
    weight_scales_ptr,
    out_ptr,
    out_scales_ptr,
    tiles_ptr,
    max_tiles,
    scale_row_stride,
    scale_column_stride,
    SIZE_D: gl.constexpr,
    SIZE_N: gl.constexpr,
    GATED: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """x @ W.T of each expert's rows in bfloat16; with GATED silu(x @ W[:N].T) * (x @ W[N:].T) in
    fp8, with a scale for each 128 columns."""
    x_2SMD = gl.allocate_shared_memory(gl.float8e4nv, [2 * _STAGES, _M, _D], _SHARED)
    weight_2SND = gl.allocate_shared_memory(gl.float8e4nv, [2 * _STAGES, _N, _D], _SHARED)
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    full_S = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], layout)
    free_S = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], layout)
    for place in gl.static_range(_STAGES):
        mbarrier.init(full_S.index(place), count=1)
        mbarrier.init(free_S.index(place), count=2)
    fence_async_shared()
    warps_barrier()
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    gl.warp_specialize(
        [
            (
                _multiply_first_half,
                (
                    x_2SMD, weight_2SND, full_S, free_S, x_scales_ptr, weight_scales_ptr, out_ptr,
                    out_scales_ptr, tiles_ptr, max_tiles, scale_row_stride, scale_column_stride,
                    SIZE_D, SIZE_N, GATED,
                ),
            ),
            (
                _multiply_second_half,
                (
                    x_2SMD, weight_2SND, full_S, free_S, x_scales_ptr, weight_scales_ptr, out_ptr,
                    out_scales_ptr, tiles_ptr, max_tiles, scale_row_stride, scale_column_stride,
                    SIZE_D, SIZE_N, GATED,
                ),
            ),
            (
                _copy_tiles,
                (
                    x_blocks, weight_blocks, x_2SMD, weight_2SND, full_S, free_S, tiles_ptr,
                    max_tiles, SIZE_D, SIZE_N, GATED,
                ),
            ),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )  # fmt: skip


def takes(gate_up_L2IE: BlockFp8, down_LEI: BlockFp8) -> bool:
    """Whether the kernel computes both products of such experts."""
    size_E, size_I = down_LEI.values_OI.shape[1:]
    return bool(size_E % (2 * BLOCK) == 0 and size_I % BLOCK == 0)


def multiply(
    rows: ExpertRows,
    weight: BlockFp8,
    tiles: ExpertTiles,
    out_PN: Tensor,
    out_scales: Tensor | None,
) -> None:
    """One product of every expert, of rows in the order of their places; gated where the result's
    scales are asked for."""
    assert rows.source_P is None
    assert rows.scales is not None
    assert rows.scales.dim() == 2
    assert rows.values.is_contiguous()
    assert tiles.block_M == ROWS
    if tiles.max_tiles == 0:
        return
    num_experts, num_rows, size_D = weight.values_OI.shape
    size_N, device = out_PN.shape[1], out_PN.device
    gated = out_scales is not None
    shape = [num_experts * num_rows, size_D]
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    columns = size_N // (BLOCK if gated else 2 * BLOCK)
    many_rows_kernel[(min(programs, tiles.max_tiles * columns),)](
        TensorDescriptor.from_tensor(rows.values, [HALF_ROWS, BLOCK], SHARED),
        TensorDescriptor(weight.values_OI, shape, [size_D, 1], [BLOCK, BLOCK], SHARED),
        rows.scales,
        weight.scales,
        out_PN,
        out_PN if out_scales is None else out_scales,
        tiles.tiles,
        tiles.max_tiles,
        rows.scales.stride(0),
        rows.scales.stride(1),
        SIZE_D=size_D,
        SIZE_N=size_N,
        GATED=gated,
        num_warps=4,
        **options(device),
    )
