"""Gluon kernel of attention for prompts, for Hopper.

It does what plugins.attention._triton_heads.prompt_kernels does, for bfloat16 heads of 128
dimensions. A warp brings in tiles by the copy engine, as far ahead as there is room; two
warpgroups, which wait for nothing but those tiles, each take half of a block's rows. Each asks for
the scores of a tile before it looks at those of the tile before, so that tensor cores work during
the softmax. A fixed number of programs take blocks in turn, of a sequence the longest contexts
first: the tiles of the next block arrive while a block's result is stored.

Without a cached prefix keys and values are read where they were projected. With one, those of the
new rows too are read from the pages of the cache, where they are as well: tiles begin at positions
that their size divides, so that pages end where tiles do, and blocks of rows as tiles do, so that
only a block's last tile has tokens that not every row sees.

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

from core.gpu_tools.gluon_sync import release, warps_barrier

HALF_ROWS = 64
ROWS = 2 * HALF_ROWS
TOKENS = 128
HEAD_DIM = 128

_M = gl.constexpr(HALF_ROWS)
_N = gl.constexpr(TOKENS)
_D = gl.constexpr(HEAD_DIM)
_BUFFERS = gl.constexpr(2)  # of keys and of values
_CLEARED = gl.constexpr(16)  # rows at once
SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_SHARED = gl.constexpr(SHARED)
_TILE = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
)
_WEIGHTS = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=_TILE.value, k_width=2))


@gluon.jit
def _copy_tile(
    blocks, parts, place, full, first_row, column, table_ptr, first_page, num_pages,
    PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """A tile of keys or values in one head: new rows from `first_row` on, or with a PAGE_SIZE
    pages from `first_page` on. A column of pages is the swizzled half of a tile's columns."""
    mbarrier.expect(full, 2 * _N * _D)
    if PAGE_SIZE == 0:
        tma.async_copy_global_to_shared(blocks, [first_row, column], full, parts.index(place))
    else:
        PAGES: gl.constexpr = _N // PAGE_SIZE
        for index in gl.static_range(PAGES):
            number = first_page + index
            page = gl.load(table_ptr + number, mask=number < num_pages, other=0)
            for half in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    blocks,
                    [page * PAGE_SIZE, column + half * (_D // 2)],
                    full,
                    parts.index((place * 2 + half) * PAGES + index),
                )


@gluon.jit
def _copy_tiles(
    q_blocks, k_blocks, v_blocks, q_2MD, k_parts, v_parts, q_full, q_free, k_full_B, k_free_B,
    v_full_B, v_free_B, blocks_ptr, table_ptr, num_blocks, table_stride, H: gl.constexpr,
    G: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """What all blocks of this program read, in the order in which it is read."""
    PAGES: gl.constexpr = _N // PAGE_SIZE if PAGE_SIZE else 0
    count = 0  # of tiles so far: buffers take turns
    turn = 0  # of blocks
    for item in range(gl.program_id(0), num_blocks * H, gl.num_programs(0)):
        block_ptr = blocks_ptr + item // H * 5
        start = gl.load(block_ptr)
        first_row = gl.load(block_ptr + 1)
        num_rows = gl.load(block_ptr + 2)
        position = gl.load(block_ptr + 3)
        own_table_ptr = table_ptr + gl.load(block_ptr + 4).to(gl.int64) * table_stride
        if position >= 0:
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
            num_tiles = position // _N + 1
            num_pages = 0
            if PAGE_SIZE:
                num_pages = (position - first_row + num_rows + PAGE_SIZE - 1) // PAGE_SIZE
            for index in range(num_tiles):
                tile = num_tiles - 1 - index
                place = count % _BUFFERS
                free_phase = (count // _BUFFERS & 1) ^ 1
                mbarrier.wait(k_free_B.index(place), free_phase)
                _copy_tile(
                    k_blocks, k_parts, place, k_full_B.index(place), start + tile * _N, kv_column,
                    own_table_ptr, tile * PAGES, num_pages, PAGE_SIZE,
                )  # fmt: skip
                mbarrier.wait(v_free_B.index(place), free_phase)
                _copy_tile(
                    v_blocks, v_parts, place, v_full_B.index(place), start + tile * _N, kv_column,
                    own_table_ptr, tile * PAGES, num_pages, PAGE_SIZE,
                )  # fmt: skip
                count += 1


@gluon.jit
def _clear_rows(values_ND, num_tokens):
    """Zeros for the rows behind a sequence's end, which a weight of 0 doesn't keep out if they are
    NaN. Both halves do it, each before it looks: they store the same."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    for first in gl.static_range(0, _N, _CLEARED):
        if num_tokens < first + _CLEARED:
            part = values_ND.slice(first, _CLEARED)
            rows = first + gl.arange(0, _CLEARED, layout=gl.SliceLayout(1, layout))
            part.store(gl.where((rows < num_tokens)[:, None], part.load(layout), 0.0))
    fence_async_shared()
    warps_barrier()


@gluon.jit
def _attend_half(
    half: gl.constexpr, q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B, v_free_B,
    out_ptr, blocks_ptr, num_blocks, most_rows, SCALE_LOG2: gl.constexpr, H: gl.constexpr,
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
        block_ptr = blocks_ptr + item // H * 5
        start = gl.load(block_ptr)
        first_row = gl.load(block_ptr + 1)
        num_rows = gl.load(block_ptr + 2)
        position = gl.load(block_ptr + 3)
        result_MD = gl.zeros([_M, _D], gl.float32, _TILE)
        if position >= 0:
            mbarrier.wait(q_full, turn & 1)
            turn += 1
            num_tiles = position // _N + 1
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
            if num_rows < first_row + _N:
                mbarrier.wait(v_full_B.index(place), phase)
                _clear_rows(v_BND.index(place), num_rows - first_row)
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
        own_M = first_row + rows_M
        places_MD = ((start + own_M).to(gl.int64) * H + item % H)[:, None] * _D + columns_D[None, :]
        inside_M = (own_M >= 0) & (own_M < num_rows) & (start + own_M < most_rows)
        gl.store(out_ptr + places_MD, result_MD.to(gl.bfloat16), mask=inside_M[:, None])


@gluon.jit
def _attend_first_half(
    q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B, v_free_B, out_ptr,
    blocks_ptr, num_blocks, most_rows, SCALE_LOG2: gl.constexpr, H: gl.constexpr,
):  # fmt: skip
    """The first one, as a function of its own: such is what warps are given to do."""
    _attend_half(
        0, q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B, v_free_B, out_ptr,
        blocks_ptr, num_blocks, most_rows, SCALE_LOG2, H,
    )  # fmt: skip


@gluon.jit
def _attend_second_half(
    q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B, v_free_B, out_ptr,
    blocks_ptr, num_blocks, most_rows, SCALE_LOG2: gl.constexpr, H: gl.constexpr,
):  # fmt: skip
    """The second one, as a function of its own: such is what warps are given to do."""
    _attend_half(
        1, q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B, v_free_B, out_ptr,
        blocks_ptr, num_blocks, most_rows, SCALE_LOG2, H,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=["num_blocks", "most_rows", "table_stride"],
    do_not_specialize_on_alignment=["blocks_ptr", "table_ptr"],
)
def prompt_kernel(
    q_blocks,
    k_blocks,
    v_blocks,
    out_ptr,
    blocks_ptr,
    table_ptr,
    num_blocks,
    most_rows,
    table_stride,
    SCALE_LOG2: gl.constexpr,
    H: gl.constexpr,
    G: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
):
    """Blocks of 128 rows of one sequence in one query head. A block's numbers: its sequence's first
    row, its own first row there (below 0: of a block that begins before the new rows), the
    sequence's rows, the position of its first row, and the sequence; or, as no sequence has them, a
    row, 0, how many rows from there become zero, and -1. With a PAGE_SIZE keys and values are those
    of the cache, as its pages lie, else new rows."""
    q_2MD = gl.allocate_shared_memory(gl.bfloat16, [2, _M, _D], _SHARED)
    k_BND = gl.allocate_shared_memory(gl.bfloat16, [_BUFFERS, _N, _D], _SHARED)
    v_BND = gl.allocate_shared_memory(gl.bfloat16, [_BUFFERS, _N, _D], _SHARED)
    k_parts = k_BND
    v_parts = v_BND
    if PAGE_SIZE:
        parts: gl.constexpr = [_BUFFERS * 2 * (_N // PAGE_SIZE), PAGE_SIZE, _D // 2]
        k_parts = k_BND._reinterpret(gl.bfloat16, parts, _SHARED)
        v_parts = v_BND._reinterpret(gl.bfloat16, parts, _SHARED)
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
                    out_ptr, blocks_ptr, num_blocks, most_rows, SCALE_LOG2, H,
                ),
            ),
            (
                _attend_second_half,
                (
                    q_2MD, k_BND, v_BND, q_full, q_free, k_full_B, k_free_B, v_full_B, v_free_B,
                    out_ptr, blocks_ptr, num_blocks, most_rows, SCALE_LOG2, H,
                ),
            ),
            (
                _copy_tiles,
                (
                    q_blocks, k_blocks, v_blocks, q_2MD, k_parts, v_parts, q_full, q_free, k_full_B,
                    k_free_B, v_full_B, v_free_B, blocks_ptr, table_ptr, num_blocks, table_stride,
                    H, G, PAGE_SIZE,
                ),
            ),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )  # fmt: skip
