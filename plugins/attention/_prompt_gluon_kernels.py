"""Gluon kernel of attention for prompts without a cached prefix, for Hopper.

It does what plugins.attention._triton_prompt_kernels does, for bfloat16 heads of 128 dimensions. A
warp brings in tiles by the copy engine, as far ahead as there is room; two warpgroups, which wait
for nothing but those tiles, each take half of a block's rows. Each asks for the scores of a tile
before it looks at those of the tile before, so that tensor cores work during the softmax. A fixed
number of programs take blocks in turn, the longest contexts first: the tiles of the next block
arrive while a block's result is stored.

Shape legend: M new rows of a block's half, N tokens of a tile, D head dimension, H and G query and
KV heads.
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

from core.kernels.gluon_sync import release, warps_barrier

HALF_ROWS = 64
ROWS = 2 * HALF_ROWS
TOKENS = 128
HEAD_DIM = 128

_M = gl.constexpr(HALF_ROWS)
_N = gl.constexpr(TOKENS)
_D = gl.constexpr(HEAD_DIM)
_BUFFERS = gl.constexpr(2)  # of keys and of values
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_SHARED = gl.constexpr(SHARED)
_TILE = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
)
_WEIGHTS = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=_TILE.value, k_width=2))


@gluon.jit
def _copy_tiles(
    q_blocks, k_blocks, v_blocks, q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B,
    v_free_B, blocks_ptr, num_blocks, H: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """What all blocks of this program read, in the order in which it is read."""
    count = 0  # of tiles so far: buffers take turns
    turn = 0  # of blocks
    for item in range(gl.program_id(0), num_blocks * H, gl.num_programs(0)):
        block_ptr = blocks_ptr + item // H * 4
        start = gl.load(block_ptr)
        first_row = gl.load(block_ptr + 1)
        if first_row >= 0:
            head = item % H
            kv_column = head // (H // G) * _D
            mbarrier.wait(q_free, (turn & 1) ^ 1)
            mbarrier.expect(q_full, 2 * 2 * _M * _D)
            for half in gl.static_range(2):
                row = start + first_row + half * _M
                tma.async_copy_global_to_shared(
                    q_blocks, [row, head * _D], q_full, q_2MD.index(half)
                )
            turn += 1
            num_tiles = first_row // _N + 1
            for index in range(num_tiles):
                row = start + (num_tiles - 1 - index) * _N
                place = count % _BUFFERS
                free_phase = (count // _BUFFERS & 1) ^ 1
                mbarrier.wait(k_free_B.index(place), free_phase)
                mbarrier.expect(k_full_B.index(place), 2 * _N * _D)
                tma.async_copy_global_to_shared(
                    k_blocks, [row, kv_column], k_full_B.index(place), k_BND.index(place)
                )
                mbarrier.wait(v_free_B.index(place), free_phase)
                mbarrier.expect(v_full_B.index(place), 2 * _N * _D)
                tma.async_copy_global_to_shared(
                    v_blocks, [row, kv_column], v_full_B.index(place), v_BND.index(place)
                )
                count += 1


@gluon.jit
def _attend_half(
    half: gl.constexpr, q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B, v_free_B,
    out_ptr, blocks_ptr, num_blocks, SCALE_LOG2: gl.constexpr, H: gl.constexpr,
):  # fmt: skip
    """A half of the rows of all blocks of this program."""
    q_MD = q_2MD.index(half)
    rows_M = half * _M + gl.arange(0, _M, layout=gl.SliceLayout(1, _TILE))
    tokens_N = gl.arange(0, _N, layout=gl.SliceLayout(0, _TILE))
    columns_D = gl.arange(0, _D, layout=gl.SliceLayout(0, _TILE))
    no_scores_MN = gl.zeros([_M, _N], gl.float32, _TILE)
    count = 0
    turn = 0
    for item in range(gl.program_id(0), num_blocks * H, gl.num_programs(0)):
        block_ptr = blocks_ptr + item // H * 4
        start = gl.load(block_ptr)
        first_row = gl.load(block_ptr + 1)
        num_rows = gl.load(block_ptr + 2)
        result_MD = gl.zeros([_M, _D], gl.float32, _TILE)
        if first_row >= 0:
            mbarrier.wait(q_full, turn & 1)
            turn += 1
            num_tiles = first_row // _N + 1
            # The tile of the block's own rows, of which each sees those up to itself.
            place = count % _BUFFERS
            phase = count // _BUFFERS & 1
            mbarrier.wait(k_full_B.index(place), phase)
            scores_MN = warpgroup_mma(
                q_MD, k_BND.index(place).permute((1, 0)), no_scores_MN, use_acc=False, is_async=True
            )
            scores_MN = warpgroup_mma_wait(0, deps=[scores_MN])
            release(k_free_B.index(place))
            seen_MN = tokens_N[None, :] <= rows_M[:, None]
            scores_MN = gl.where(seen_MN, scores_MN, float("-inf"))
            most_M = gl.max(scores_MN, axis=1) * SCALE_LOG2
            weights_MN = gl.exp2(scores_MN * SCALE_LOG2 - most_M[:, None])
            sum_M = gl.sum(weights_MN, axis=1)
            operand_MN = gl.convert_layout(weights_MN.to(gl.bfloat16), _WEIGHTS)
            acc_MD = gl.zeros([_M, _D], gl.float32, _TILE)
            for _index in range(1, num_tiles):
                count += 1
                next_place = count % _BUFFERS
                next_phase = count // _BUFFERS & 1
                mbarrier.wait(k_full_B.index(next_place), next_phase)
                next_MN = warpgroup_mma(
                    q_MD, k_BND.index(next_place).permute((1, 0)), no_scores_MN,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                mbarrier.wait(v_full_B.index(place), phase)
                acc = warpgroup_mma(operand_MN, v_BND.index(place), acc_MD, is_async=True)
                scores_MN = warpgroup_mma_wait(1, deps=[next_MN])
                release(k_free_B.index(next_place))
                new_most_M = gl.maximum(most_M, gl.max(scores_MN, axis=1) * SCALE_LOG2)
                weights_MN = gl.exp2(scores_MN * SCALE_LOG2 - new_most_M[:, None])
                shrink_M = gl.exp2(most_M - new_most_M)
                sum_M = sum_M * shrink_M + gl.sum(weights_MN, axis=1)
                most_M = new_most_M
                acc_MD, _used = warpgroup_mma_wait(0, deps=[acc, operand_MN])
                release(v_free_B.index(place))
                acc_MD = acc_MD * shrink_M[:, None]
                operand_MN = gl.convert_layout(weights_MN.to(gl.bfloat16), _WEIGHTS)
                place = next_place
                phase = next_phase
            count += 1
            mbarrier.arrive(q_free, count=1)
            mbarrier.wait(v_full_B.index(place), phase)
            acc = warpgroup_mma(operand_MN, v_BND.index(place), acc_MD, is_async=True)
            acc_MD, _used = warpgroup_mma_wait(0, deps=[acc, operand_MN])
            release(v_free_B.index(place))
            result_MD = acc_MD / sum_M[:, None]
        own_M = gl.maximum(first_row, 0) + rows_M
        places_MD = ((start + own_M).to(gl.int64) * H + item % H)[:, None] * _D + columns_D[None, :]
        gl.store(out_ptr + places_MD, result_MD.to(gl.bfloat16), mask=(own_M < num_rows)[:, None])


@gluon.jit
def _attend_first_half(
    q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B, v_free_B, out_ptr,
    blocks_ptr, num_blocks, SCALE_LOG2: gl.constexpr, H: gl.constexpr,
):  # fmt: skip
    """The first one, as a function of its own: such is what warps are given to do."""
    _attend_half(
        0, q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B, v_free_B, out_ptr,
        blocks_ptr, num_blocks, SCALE_LOG2, H,
    )  # fmt: skip


@gluon.jit
def _attend_second_half(
    q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B, v_free_B, out_ptr,
    blocks_ptr, num_blocks, SCALE_LOG2: gl.constexpr, H: gl.constexpr,
):  # fmt: skip
    """The second one, as a function of its own: such is what warps are given to do."""
    _attend_half(
        1, q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B, v_free_B, out_ptr,
        blocks_ptr, num_blocks, SCALE_LOG2, H,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=["num_blocks"],
    do_not_specialize_on_alignment=["blocks_ptr"],
)
def prompt_kernel(
    q_blocks,
    k_blocks,
    v_blocks,
    out_ptr,
    blocks_ptr,
    num_blocks,
    SCALE_LOG2: gl.constexpr,
    H: gl.constexpr,
    G: gl.constexpr,
):
    """Blocks of 128 new rows of one sequence in one query head. A block's numbers: its sequence's
    first row, its own first row there, and the sequence's rows; or a row, -1, and how many rows
    from there become zero, as no sequence has them (none: nothing). A fourth fills 16 bytes."""
    q_2MD = gl.allocate_shared_memory(gl.bfloat16, [2, _M, _D], _SHARED)
    k_BND = gl.allocate_shared_memory(gl.bfloat16, [_BUFFERS, _N, _D], _SHARED)
    v_BND = gl.allocate_shared_memory(gl.bfloat16, [_BUFFERS, _N, _D], _SHARED)
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], layout)
    q_free = gl.allocate_shared_memory(gl.int64, [1], layout)
    k_full_B = gl.allocate_shared_memory(gl.int64, [_BUFFERS, 1], layout)
    k_free_B = gl.allocate_shared_memory(gl.int64, [_BUFFERS, 1], layout)
    v_full_B = gl.allocate_shared_memory(gl.int64, [_BUFFERS, 1], layout)
    v_free_B = gl.allocate_shared_memory(gl.int64, [_BUFFERS, 1], layout)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=2)
    for place in gl.static_range(_BUFFERS):
        mbarrier.init(k_full_B.index(place), count=1)
        mbarrier.init(v_full_B.index(place), count=1)
        mbarrier.init(k_free_B.index(place), count=2)
        mbarrier.init(v_free_B.index(place), count=2)
    fence_async_shared()
    warps_barrier()
    gl.warp_specialize(
        [
            (
                _attend_first_half,
                (
                    q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B, v_free_B,
                    out_ptr, blocks_ptr, num_blocks, SCALE_LOG2, H,
                ),
            ),
            (
                _attend_second_half,
                (
                    q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B, v_free_B,
                    out_ptr, blocks_ptr, num_blocks, SCALE_LOG2, H,
                ),
            ),
            (
                _copy_tiles,
                (
                    q_blocks, k_blocks, v_blocks, q_2MD, k_BND, v_BND, q_full, q_free, k_full_B,
                    k_free_B, v_full_B, v_free_B, blocks_ptr, num_blocks, H, G,
                ),
            ),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )  # fmt: skip
