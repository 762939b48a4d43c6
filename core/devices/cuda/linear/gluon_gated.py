"""Gated linear layers of many rows on Hopper: tiles of 128 rows by 128 outputs, in Gluon.

A warp brings in tiles by the copy engine, as far ahead as there is room; two warpgroups, which wait
for nothing but those tiles, each multiply half of the rows by all of the weight's, in products of
64 x 256: the larger a product, the less of the shared memory's time it takes. Rows of the weight
come as 8 of the gate, the 8 of what it multiplies, and so on, so that both end in the same thread's
registers. A fixed number of programs take tiles in turn, neighbours together, so that rows and
weights are found in the L2 cache. Sums are float32, rounded once.

Knows nothing of which kernel suits which shape (core.devices.cuda.linear.triton_linear). Imported
only where a Hopper GPU is: Gluon kernels run in no interpreter. Shape legend: T rows, O outputs, I
inputs, N rows of the weight.
"""

# Kernels are written in Gluon, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
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

from core.gpu_tools.gluon_sync import release, warps_barrier
from core.interfaces.ops import LinearKernel

HALF_ROWS = 64
WEIGHT_ROWS = 256
INPUTS = 64
STAGES = 4
NEIGHBOURS = 8  # tiles of rows that share a weight's tile while it is in the cache
_ALIGNMENT = 16  # bytes, of addresses and strides

_T = gl.constexpr(HALF_ROWS)
_N = gl.constexpr(WEIGHT_ROWS)
_I = gl.constexpr(INPUTS)
_STAGES = gl.constexpr(STAGES)
_NEIGHBOURS = gl.constexpr(NEIGHBOURS)
ROWS_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
WEIGHT_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
_ROWS_SHARED = gl.constexpr(ROWS_SHARED)
_WEIGHT_SHARED = gl.constexpr(WEIGHT_SHARED)
_SUMS = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
)


@gluon.jit
def _tile_of(index, num_T, num_O: gl.constexpr):
    """(tile of rows, tile of outputs): some tiles of rows by all of outputs, in turn."""
    first = index // (_NEIGHBOURS * num_O) * _NEIGHBOURS
    count = gl.minimum(num_T - first, _NEIGHBOURS)
    within = index % (_NEIGHBOURS * num_O)
    return first + within % count, within // count


@gluon.jit
def _copy_tiles(
    x_blocks, weight_blocks, x_2STI, weight_SNI, full_S, free_S, num_T, num_O: gl.constexpr,
    SIZE_I: gl.constexpr,
):  # fmt: skip
    """What all tiles of this program read, in the order in which it is read."""
    count = 0  # of copies so far: buffers take turns
    for index in range(gl.program_id(0), num_T * num_O, gl.num_programs(0)):
        tile_T, tile_O = _tile_of(index, num_T, num_O)
        for step in range(0, SIZE_I, _I):
            place = count % _STAGES
            mbarrier.wait(free_S.index(place), (count // _STAGES & 1) ^ 1)
            full = full_S.index(place)
            mbarrier.expect(full, 2 * (2 * _T + _N) * _I)
            for half in gl.static_range(2):
                row = (tile_T * 2 + half) * _T
                tma.async_copy_global_to_shared(
                    x_blocks, [row, step], full, x_2STI.index(place * 2 + half)
                )
            tma.async_copy_global_to_shared(
                weight_blocks, [tile_O * (_N // 16), 0, 0, step], full, weight_SNI.index(place)
            )
            count += 1


@gluon.jit
def _multiply_half(
    half: gl.constexpr, x_2STI, weight_SNI, full_S, free_S, out_ptr, num_rows, num_T,
    num_O: gl.constexpr, SIZE_I: gl.constexpr, SIZE_O: gl.constexpr,
):  # fmt: skip
    """Half of the rows of all tiles of this program."""
    no_sums_TN = gl.zeros([_T, _N], gl.float32, _SUMS)
    count = 0
    for index in range(gl.program_id(0), num_T * num_O, gl.num_programs(0)):
        tile_T, tile_O = _tile_of(index, num_T, num_O)
        sums_TN = no_sums_TN
        for step in range(0, SIZE_I, _I):
            place = count % _STAGES
            mbarrier.wait(full_S.index(place), count // _STAGES & 1)
            weight_IN = weight_SNI.index(place).reshape([_N, _I]).permute((1, 0))
            sums = warpgroup_mma(
                x_2STI.index(place * 2 + half), weight_IN, sums_TN, use_acc=step > 0, is_async=True
            )
            sums_TN = warpgroup_mma_wait(1, deps=[sums])  # all but this one
            if step > 0:
                release(free_S.index((count - 1) % _STAGES))
            count += 1
        sums_TN = warpgroup_mma_wait(0, deps=[sums_TN])
        release(free_S.index((count - 1) % _STAGES))
        first_row = (tile_T * 2 + half) * _T
        pairs = sums_TN.reshape([_T, _N // 16, 2, 8]).permute((0, 1, 3, 2))
        gate, up = gl.split(pairs)
        result = (gate / (1.0 + gl.exp(-gate)) * up).to(gl.bfloat16)
        result_TO = result.reshape([_T, _N // 2])
        layout: gl.constexpr = result_TO.type.layout
        rows_T = first_row + gl.arange(0, _T, layout=gl.SliceLayout(1, layout))
        own_O = gl.arange(0, _N // 2, layout=gl.SliceLayout(0, layout))
        columns_O = tile_O * (_N // 2) + own_O
        places_TO = rows_T.to(gl.int64)[:, None] * SIZE_O + columns_O[None, :]
        inside_TO = (rows_T < num_rows)[:, None] & (columns_O < SIZE_O)[None, :]
        gl.store(out_ptr + places_TO, result_TO, mask=inside_TO)


@gluon.jit
def _multiply_first_half(
    x_2STI, weight_SNI, full_S, free_S, out_ptr, num_rows, num_T,
    num_O: gl.constexpr, SIZE_I: gl.constexpr, SIZE_O: gl.constexpr,
):  # fmt: skip
    """The first one, as a function of its own: such is what warps are given to do."""
    _multiply_half(
        0, x_2STI, weight_SNI, full_S, free_S, out_ptr, num_rows, num_T, num_O, SIZE_I, SIZE_O,
    )  # fmt: skip


@gluon.jit
def _multiply_second_half(
    x_2STI, weight_SNI, full_S, free_S, out_ptr, num_rows, num_T,
    num_O: gl.constexpr, SIZE_I: gl.constexpr, SIZE_O: gl.constexpr,
):  # fmt: skip
    """The second one, as a function of its own: such is what warps are given to do."""
    _multiply_half(
        1, x_2STI, weight_SNI, full_S, free_S, out_ptr, num_rows, num_T, num_O, SIZE_I, SIZE_O,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_rows"])
def gated_kernel(
    x_blocks,
    weight_blocks,
    out_ptr,
    num_rows,
    SIZE_I: gl.constexpr,
    SIZE_O: gl.constexpr,
):
    """What lies past the end reads as zero, and is not stored."""
    num_T = gl.cdiv(num_rows, 2 * _T)
    num_O: gl.constexpr = (2 * SIZE_O + _N - 1) // _N
    x_2STI = gl.allocate_shared_memory(gl.bfloat16, [2 * _STAGES, _T, _I], _ROWS_SHARED)
    weight_SNI = gl.allocate_shared_memory(
        gl.bfloat16, [_STAGES, _N // 16, 2, 8, _I], _WEIGHT_SHARED
    )
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    full_S = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], layout)
    free_S = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], layout)
    for place in gl.static_range(_STAGES):
        mbarrier.init(full_S.index(place), count=1)
        mbarrier.init(free_S.index(place), count=2)
    fence_async_shared()
    warps_barrier()
    gl.warp_specialize(
        [
            (
                _multiply_first_half,
                (
                    x_2STI, weight_SNI, full_S, free_S, out_ptr, num_rows, num_T, num_O, SIZE_I,
                    SIZE_O,
                ),
            ),
            (
                _multiply_second_half,
                (
                    x_2STI, weight_SNI, full_S, free_S, out_ptr, num_rows, num_T, num_O, SIZE_I,
                    SIZE_O,
                ),
            ),
            (
                _copy_tiles,
                (x_blocks, weight_blocks, x_2STI, weight_SNI, full_S, free_S, num_T, num_O, SIZE_I),
            ),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )  # fmt: skip


def takes(weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype | None) -> bool:
    """Whether the kernel computes a gated layer, with results of `dtype` (None: that of rows)."""
    num_weight_rows, size_I = weight_OI.shape
    return (
        bias_O is None
        and weight_OI.dtype is torch.bfloat16
        and dtype in (None, torch.bfloat16)
        and weight_OI.is_contiguous()
        and num_weight_rows % 16 == 0
        and size_I % INPUTS == 0
        and weight_OI.data_ptr() % _ALIGNMENT == 0
    )


def gated(weight_OI: Tensor) -> LinearKernel:
    """A layer that `takes` says the kernel computes; any number of rows in bfloat16."""
    size_O, size_I = weight_OI.shape[0] // 2, weight_OI.shape[1]
    weight = TensorDescriptor(
        weight_OI,
        [size_O // 8, 2, 8, size_I],
        [8 * size_I, size_O * size_I, size_I, 1],
        [WEIGHT_ROWS // 16, 2, 8, INPUTS],
        WEIGHT_SHARED,
    )
    tiles_O = triton.cdiv(2 * size_O, WEIGHT_ROWS)
    device = weight_OI.device
    most_programs = torch.cuda.get_device_properties(device).multi_processor_count

    def run(x_TI: Tensor) -> Tensor:
        x = x_TI if _readable(x_TI) else x_TI.clone(memory_format=torch.contiguous_format)
        num_rows = x.shape[0]
        out = torch.empty((num_rows, size_O), dtype=x.dtype, device=device)
        if num_rows == 0:
            return out
        programs = min(triton.cdiv(num_rows, 2 * HALF_ROWS) * tiles_O, most_programs)
        gated_kernel[(programs,)](
            TensorDescriptor.from_tensor(x, [HALF_ROWS, INPUTS], ROWS_SHARED),
            weight,
            out,
            num_rows,
            SIZE_I=size_I,
            SIZE_O=size_O,
            num_warps=4,
        )
        return out

    return run


def _readable(x_TI: Tensor) -> bool:
    """Whether the copy engine can read the rows where they lie."""
    apart = x_TI.stride(0) * x_TI.element_size()
    return x_TI.stride(1) == 1 and apart % _ALIGNMENT == 0 and x_TI.data_ptr() % _ALIGNMENT == 0
