"""Gluon kernel of absorbed latent attention for Hopper: pieces of a line of tiles.

It does what plugins.attention._triton_latent.decode_kernels does, for bfloat16 vectors of 512 + 64
and blocks of 64 heads, with layouts and copies chosen by hand: the queries and two tiles of 64
tokens stay in shared memory, the copy of one tile runs while the other is worked on. Two warpgroups
share each tile: each takes half of its tokens for the scores and half of the columns of the result,
and both read all weights from shared memory. The scores of a tile are asked for right behind the
result of the tile before, so that tensor cores go from one to the other. Knows nothing of other
dtypes or dimensions.

Measured on an H100, 128 heads, 128 sequences of 4,096 tokens: 323 us; without its copies 293,
without its products 259. Smaller tiles in more buffers, queries in registers, or a maximum that is
looked at after each tile's weights instead of before made it no faster.

Shape legend: see core.interfaces.latent_attention; M heads of a block, N tokens of a tile.
"""

# Kernels are written in Gluon, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from core.gpu_tools.gluon_sync import let_successor_start, wait_for_predecessor, warps_barrier
from plugins.attention._triton_heads.decode_schedule import SCHEDULE_COLUMNS

HEADS = 64
TOKENS = 64
LATENT_DIM = 512
ROPE_DIM = 64

_M = gl.constexpr(HEADS)
_N = gl.constexpr(TOKENS)
_C = gl.constexpr(LATENT_DIM)
_R = gl.constexpr(ROPE_DIM)
_COLUMNS = gl.constexpr(SCHEDULE_COLUMNS.value)
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_SHARED = gl.constexpr(SHARED)
_SCORES = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 32, 16])
)
_RESULT = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 256, 16])
)
_CLEARED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))


@gluon.jit
def _copy_tile(latent_blocks, rope_blocks, slot, arrived, latent_NC, rope_NR, wanted):
    mbarrier.expect(arrived, 2 * _N * (_C + _R), pred=wanted)
    tma.async_copy_global_to_shared(latent_blocks, [slot, 0], arrived, latent_NC, pred=wanted)
    tma.async_copy_global_to_shared(rope_blocks, [slot, _C], arrived, rope_NR, pred=wanted)


@gluon.jit
def _clear_rows(latent_NC, num_valid):
    """Zeros in the rows from `num_valid` on, which may hold anything."""
    for first in gl.static_range(0, _C, 64):
        part = latent_NC.slice(first, 64, dim=1)
        rows_N = gl.arange(0, _N, layout=gl.SliceLayout(1, _CLEARED))
        values_NX = part.load(_CLEARED)
        part.store(gl.where((rows_N < num_valid)[:, None], values_NX, gl.zeros_like(values_NX)))
    fence_async_shared()


@gluon.jit
def _slot(table_row_ptr, tile, PAGE_SIZE: gl.constexpr):
    token = tile * _N
    return gl.load(table_row_ptr + token // PAGE_SIZE) * PAGE_SIZE + token % PAGE_SIZE


@gluon.jit
def _score(q_latent_MC, q_rope_MR, latent_NC, rope_NR):
    """Asks for the scores of a tile; doesn't wait."""
    scores_MN = gl.zeros([_M, _N], gl.float32, _SCORES)
    scores_MN = warpgroup_mma(
        q_latent_MC, latent_NC.permute((1, 0)), scores_MN, use_acc=False, is_async=True
    )
    return warpgroup_mma(q_rope_MR, rope_NR.permute((1, 0)), scores_MN, is_async=True)


@gluon.jit
def _add_tile(scores_MN, latent_NC, shared_weights_MN, most_M, sum_M, acc_MC):
    """Asks for a tile's part of the result; doesn't wait."""
    new_most_M = gl.maximum(most_M, gl.max(scores_MN, axis=1))
    shrink_M = gl.exp2(most_M - new_most_M)
    weights_MN = gl.exp2(scores_MN - new_most_M[:, None])
    shared_weights_MN.store(weights_MN.to(gl.bfloat16))
    fence_async_shared()
    acc_MC = acc_MC * gl.convert_layout(shrink_M, gl.SliceLayout(1, _RESULT))[:, None]
    warps_barrier()
    acc_MC = warpgroup_mma(shared_weights_MN, latent_NC, acc_MC, is_async=True)
    sum_M = sum_M * shrink_M + gl.sum(weights_MN, axis=1)
    return new_most_M, sum_M, acc_MC


@gluon.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["context_lens_ptr", "table_ptr"],
)
def latent_decode_kernel(
    q_latent_blocks,
    q_rope_blocks,
    latent_blocks,
    rope_blocks,
    out_ptr,
    workspace_ptr,
    schedule_ptr,
    context_lens_ptr,
    table_ptr,
    table_stride,
    SCALE_LOG2: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """A block of heads over one split of the line, as in the portable kernel."""
    NUM_BLOCKS: gl.constexpr = NUM_HEADS // _M
    program = gl.program_id(0) // NUM_BLOCKS
    num_programs = gl.num_programs(0) // NUM_BLOCKS
    first_head = gl.program_id(0) % NUM_BLOCKS * _M
    q_latent_MC = gl.allocate_shared_memory(gl.bfloat16, [_M, _C], _SHARED)
    q_rope_MR = gl.allocate_shared_memory(gl.bfloat16, [_M, _R], _SHARED)
    latents_2NC = gl.allocate_shared_memory(gl.bfloat16, [2, _N, _C], _SHARED)
    ropes_2NR = gl.allocate_shared_memory(gl.bfloat16, [2, _N, _R], _SHARED)
    shared_weights_MN = gl.allocate_shared_memory(gl.bfloat16, [_M, _N], _SHARED)
    arrived_3 = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for barrier in gl.static_range(3):
        mbarrier.init(arrived_3.index(barrier), count=1)
    fence_async_shared()
    warps_barrier()
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    schedule_ptr += program * _COLUMNS
    sequence = gl.load(schedule_ptr)
    tile = gl.load(schedule_ptr + 2)
    num_left = gl.load(schedule_ptr + 3)

    heads_M = first_head + gl.arange(0, _M, layout=gl.SliceLayout(1, _RESULT))
    columns_C = gl.arange(0, _C, layout=gl.SliceLayout(0, _RESULT))
    log_sums_ptr = workspace_ptr + num_programs * (2 * NUM_HEADS * _C)
    q_phase = 0
    count = 0  # of tiles so far: buffers take turns
    while num_left > 0:
        num_cached = gl.load(context_lens_ptr + sequence)
        num_tiles = gl.cdiv(num_cached, _N)
        num_mine = gl.minimum(num_tiles - tile, num_left)
        if num_mine > 0:
            table_row_ptr = table_ptr + sequence.to(gl.int64) * table_stride
            q_arrived = arrived_3.index(2)
            mbarrier.expect(q_arrived, 2 * _M * (_C + _R))
            row = sequence * NUM_HEADS + first_head
            tma.async_copy_global_to_shared(q_latent_blocks, [row, 0], q_arrived, q_latent_MC)
            tma.async_copy_global_to_shared(q_rope_blocks, [row, 0], q_arrived, q_rope_MR)
            for early in gl.static_range(2):
                place = (count + early) % 2
                slot = _slot(table_row_ptr, tile + gl.minimum(early, num_mine - 1), PAGE_SIZE)
                _copy_tile(
                    latent_blocks, rope_blocks, slot, arrived_3.index(place),
                    latents_2NC.index(place), ropes_2NR.index(place), early < num_mine,
                )  # fmt: skip
            most_M = gl.full([_M], float("-inf"), gl.float32, gl.SliceLayout(1, _SCORES))
            sum_M = gl.zeros([_M], gl.float32, gl.SliceLayout(1, _SCORES))
            acc_MC = gl.zeros([_M, _C], gl.float32, _RESULT)
            mbarrier.wait(q_arrived, q_phase)
            q_phase ^= 1
            place = count % 2
            mbarrier.wait(arrived_3.index(place), count // 2 % 2)
            scores_MN = _score(
                q_latent_MC, q_rope_MR, latents_2NC.index(place), ropes_2NR.index(place)
            )
            scores_MN = warpgroup_mma_wait(0, deps=[scores_MN]) * SCALE_LOG2
            for index in range(num_mine - 1):
                latent_NC = latents_2NC.index(place)
                rope_NR = ropes_2NR.index(place)
                # Beyond the last tile this one is looked up again, and not copied.
                ahead = gl.minimum(index + 2, num_mine - 1)
                slot = _slot(table_row_ptr, tile + ahead, PAGE_SIZE)
                most_M, sum_M, acc_MC = _add_tile(
                    scores_MN, latent_NC, shared_weights_MN, most_M, sum_M, acc_MC
                )
                count += 1
                next_place = count % 2
                mbarrier.wait(arrived_3.index(next_place), count // 2 % 2)
                next_MN = _score(
                    q_latent_MC, q_rope_MR,
                    latents_2NC.index(next_place), ropes_2NR.index(next_place),
                )  # fmt: skip
                acc_MC = warpgroup_mma_wait(2, deps=[acc_MC])  # all but the two of the scores
                warps_barrier()
                _copy_tile(
                    latent_blocks, rope_blocks, slot, arrived_3.index(place), latent_NC, rope_NR,
                    index + 2 < num_mine,
                )  # fmt: skip
                scores_MN = warpgroup_mma_wait(0, deps=[next_MN]) * SCALE_LOG2
                place = next_place
            latent_NC = latents_2NC.index(place)
            num_valid = num_cached - (tile + num_mine - 1) * _N
            if num_valid < _N:
                tokens_N = gl.arange(0, _N, layout=gl.SliceLayout(0, _SCORES))
                scores_MN = gl.where((tokens_N < num_valid)[None, :], scores_MN, float("-inf"))
                _clear_rows(latent_NC, num_valid)
            most_M, sum_M, acc_MC = _add_tile(
                scores_MN, latent_NC, shared_weights_MN, most_M, sum_M, acc_MC
            )
            acc_MC = warpgroup_mma_wait(0, deps=[acc_MC])
            warps_barrier()
            count += 1
            inverse_M = gl.convert_layout(1.0 / sum_M, gl.SliceLayout(1, _RESULT))
            result_MC = acc_MC * inverse_M[:, None]
            if num_mine == num_tiles:
                places_MC = heads_M[:, None] * _C + columns_C[None, :]
                gl.store(
                    out_ptr + sequence.to(gl.int64) * (NUM_HEADS * _C) + places_MC,
                    result_MC.to(gl.bfloat16),
                )
            else:
                begins = (tile == 0).to(gl.int32)
                first_place = (program * 2 + begins) * NUM_HEADS
                places_MC = heads_M[:, None] * _C + columns_C[None, :]
                gl.store(workspace_ptr + first_place * _C + places_MC, result_MC)
                rows_M = first_head + gl.arange(0, _M, layout=gl.SliceLayout(1, _SCORES))
                gl.store(log_sums_ptr + first_place + rows_M, most_M + gl.log2(sum_M))
        num_left -= num_mine
        tile *= 0
        sequence += 1
