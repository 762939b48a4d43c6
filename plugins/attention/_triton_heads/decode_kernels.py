"""Triton kernel of paged decode: attention by pieces, and the pieces' sum.

plugins.attention._triton_heads.decode_schedule explains line, splits, units and pieces. Whoever
stores the last piece of a unit sums them, in their order. Any page size: each token of a tile looks
its page up.

Shape legend: M rows of a tile and R rows of a unit (query heads of a KV head, padded for tensor
cores or to a power of two), N tokens of a tile, D head dimension (padded to a power of two), G KV
heads.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from core.gpu_tools.dependent_launch import let_successor_start, wait_for_predecessor
from plugins.attention._triton_heads.decode_schedule import SCHEDULE_COLUMNS
from plugins.attention._triton_heads.kernels import attend_tile


@triton.jit
def _fetch_lines(addresses, DEPENDENT: tl.constexpr):
    if DEPENDENT:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [addresses],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _fetch_tile(
    k_ptr,
    v_ptr,
    context_lens_ptr,
    table_ptr,
    sequence,
    kv_head,
    tile,
    table_stride,
    G: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Ask for a tile of keys and values to be in the L2 cache. What it holds may still be written:
    the cache is one for all multiprocessors."""
    LINE: tl.constexpr = 1024 // k_ptr.dtype.element_ty.primitive_bitwidth  # 128 bytes
    BLOCK_L: tl.constexpr = triton.next_power_of_2(triton.cdiv(HEAD_DIM, LINE))
    tokens_N = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    last = tl.load(context_lens_ptr + sequence) - 1
    tokens_N = tl.minimum(tokens_N, last)
    table_ptr += sequence.to(tl.int64) * table_stride
    pages_N = tl.load(table_ptr + tokens_N // PAGE_SIZE).to(tl.int64)
    slots_N = (pages_N * PAGE_SIZE + tokens_N % PAGE_SIZE) * G + kv_head
    lines_L = tl.minimum(tl.arange(0, BLOCK_L) * LINE, HEAD_DIM - 1)
    places_NL = slots_N[:, None] * HEAD_DIM + lines_L[None, :]
    _fetch_lines(k_ptr + places_NL, DEPENDENT)
    _fetch_lines(v_ptr + places_NL, DEPENDENT)


@triton.jit
def _sum_pieces(
    out_ptr, workspace_ptr, log_sums_ptr, first, num_pieces,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Store the result of a unit, all whose pieces were; the first is of split `first`. TOGETHER
    of them are waited for at once."""
    rows_R = tl.arange(0, BLOCK_R)
    columns_D = tl.arange(0, BLOCK_D)
    inside_RD = (rows_R < GROUP)[:, None] & (columns_D < HEAD_DIM)[None, :]
    places_RD = rows_R[:, None] * HEAD_DIM + columns_D[None, :]
    rows_R = tl.minimum(rows_R, GROUP - 1)  # those past the last repeat it, and are not stored
    most_R = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    sum_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
    acc_RD = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    for done in range(0, num_pieces, TOGETHER):
        for index in tl.static_range(TOGETHER):
            piece = done + index
            place = ((first + piece) * 2 + (piece == 0).to(tl.int32)) * GROUP
            inside = piece < num_pieces
            # Not through the first-level cache, which may hold what stood there before.
            log_sum_R = tl.load(
                log_sums_ptr + place + rows_R,
                mask=inside,
                other=float("-inf"),
                cache_modifier=".cg",
            )
            piece_RD = tl.load(
                workspace_ptr + place * HEAD_DIM + places_RD,
                mask=inside & inside_RD,
                other=0.0,
                cache_modifier=".cg",
            )
            new_most_R = tl.maximum(most_R, log_sum_R)
            weight_R = tl.exp2(log_sum_R - new_most_R)
            shrink_R = tl.exp2(most_R - new_most_R)
            sum_R = sum_R * shrink_R + weight_R
            acc_RD = acc_RD * shrink_R[:, None] + piece_RD * weight_R[:, None]
            most_R = new_most_R
    result_RD = (acc_RD / sum_R[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places_RD, result_RD, mask=inside_RD)


@triton.jit(
    do_not_specialize=["table_stride", "num_sequences"],
    do_not_specialize_on_alignment=["context_lens_ptr", "table_ptr"],
)
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    workspace_ptr,
    schedule_ptr,
    counts_ptr,
    context_lens_ptr,
    table_ptr,
    num_sequences,
    q_stride,
    table_stride,
    SCALE_LOG2: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LEVELS: tl.constexpr,
    TOGETHER: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One split of the line, and others as long as there are any; zeros for sequences without
    tokens, which are padding. The workspace holds, float32, the normalised results of pieces
    (splits, 2, GROUP, D), then the log2 of their sums (splits, 2, GROUP). Counts are zero
    before and after: stored pieces of the unit that each split begins, then splits taken
    beyond the first level."""
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    num_splits = num_programs * LEVELS
    split = program
    # What a step's plan wrote was complete before the kernel before this one let this one start.
    row_ptr = schedule_ptr + split * SCHEDULE_COLUMNS
    sequence = tl.load(row_ptr, cache_modifier=".cg")
    kv_head = tl.load(row_ptr + 1, cache_modifier=".cg")
    tile = tl.load(row_ptr + 2, cache_modifier=".cg")
    num_left = tl.load(row_ptr + 3, cache_modifier=".cg")
    num_padding = tl.load(row_ptr + 10, cache_modifier=".cg")
    num_later = tl.load(row_ptr + 11, cache_modifier=".cg")
    if num_left > 0:
        _fetch_tile(
            k_ptr, v_ptr, context_lens_ptr, table_ptr, sequence, kv_head, tile, table_stride,
            G, PAGE_SIZE, HEAD_DIM, BLOCK_N, DEPENDENT,
        )  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)

    rows_M = tl.arange(0, BLOCK_M)
    columns_D = tl.arange(0, BLOCK_D)
    valid_M = rows_M < GROUP
    valid_MD = valid_M[:, None] & (columns_D[None, :] < HEAD_DIM)
    log_sums_ptr = workspace_ptr + num_splits * (2 * GROUP * HEAD_DIM)
    while num_left > 0:
        num_cached = tl.load(context_lens_ptr + sequence)
        num_tiles = tl.cdiv(num_cached, BLOCK_N)
        num_mine = tl.minimum(num_tiles - tile, num_left)
        if num_mine > 0:
            heads_M = kv_head * GROUP + rows_M
            q_places_M = sequence.to(tl.int64) * q_stride + heads_M * HEAD_DIM
            q_MD = tl.load(
                q_ptr + q_places_M[:, None] + columns_D[None, :], mask=valid_MD, other=0.0
            )
            if WIDE:
                q_MD = q_MD.to(tl.float32)
            begins = (tile == 0).to(tl.int32)
            unit_ptr = schedule_ptr + split * SCHEDULE_COLUMNS + 8 - 2 * begins
            num_pieces = tl.load(unit_ptr, cache_modifier=".cg")
            first = tl.load(unit_ptr + 1, cache_modifier=".cg")
            positions_M = tl.zeros((BLOCK_M,), dtype=tl.int32) + num_cached
            most_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
            acc_MD = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
            first_token = tile * BLOCK_N
            end_token = tl.minimum(first_token + num_mine * BLOCK_N, num_cached)
            for token in range(first_token, end_token, BLOCK_N):
                most_M, sum_M, acc_MD = attend_tile(
                    q_MD, most_M, sum_M, acc_MD, token, end_token, positions_M,
                    table_ptr + sequence.to(tl.int64) * table_stride,
                    k_ptr + kv_head * HEAD_DIM, v_ptr + kv_head * HEAD_DIM,
                    SCALE_LOG2, True, WIDE, G, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
                )  # fmt: skip
            result_MD = acc_MD / sum_M[:, None]
            unit_out_ptr = out_ptr + (sequence.to(tl.int64) * G + kv_head) * (GROUP * HEAD_DIM)
            if num_mine == num_tiles:
                tl.store(
                    unit_out_ptr + rows_M[:, None] * HEAD_DIM + columns_D[None, :],
                    result_MD.to(out_ptr.dtype.element_ty),
                    mask=valid_MD,
                )
            else:
                places_M = (split * 2 + begins) * GROUP + rows_M
                tl.store(
                    workspace_ptr + places_M[:, None] * HEAD_DIM + columns_D[None, :],
                    result_MD,
                    mask=valid_MD,
                )
                tl.store(log_sums_ptr + places_M, most_M + tl.log2(sum_M), mask=valid_M)
                tl.debug_barrier()  # every thread's part is stored before it is counted
                if tl.atomic_add(counts_ptr + first, 1, sem="acq_rel") == num_pieces - 1:
                    tl.store(counts_ptr + first, 0)
                    _sum_pieces(
                        unit_out_ptr, workspace_ptr, log_sums_ptr, first, num_pieces,
                        GROUP, HEAD_DIM, BLOCK_R, BLOCK_D, TOGETHER,
                    )  # fmt: skip
        num_left -= num_mine
        tile *= 0
        kv_head += 1
        if (kv_head == G) | (num_tiles == 0):
            kv_head = 0
            sequence += 1
        if (num_left == 0) & (num_later > 0):
            taken = tl.atomic_add(counts_ptr + num_splits, 1, sem="relaxed")
            if taken < num_later:
                split = num_programs + taken
                row_ptr = schedule_ptr + split * SCHEDULE_COLUMNS
                sequence = tl.load(row_ptr, cache_modifier=".cg")
                kv_head = tl.load(row_ptr + 1, cache_modifier=".cg")
                tile = tl.load(row_ptr + 2, cache_modifier=".cg")
                num_left = tl.load(row_ptr + 3, cache_modifier=".cg")
            elif taken == num_later + num_programs - 1:  # the last program found nothing left
                tl.store(counts_ptr + num_splits, 0)
    if num_padding > 0:
        for padding in range(program, num_sequences, num_programs):
            if tl.load(context_lens_ptr + padding) == 0:
                for row in range(G * GROUP):
                    places_D = (padding * (G * GROUP) + row) * HEAD_DIM + columns_D
                    zeros_D = tl.zeros((BLOCK_D,), dtype=out_ptr.dtype.element_ty)
                    tl.store(out_ptr + places_D, zeros_D, mask=columns_D < HEAD_DIM)
