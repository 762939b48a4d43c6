"""Triton kernels of paged decode: attention by pieces, and the pieces' sum.

plugins.attention._decode_schedule explains line, stretches, units and pieces. Any page size: each
token of a tile looks its page up.

Shape legend: P programs, M rows of a tile (query heads of a KV head), N tokens of a tile, D head
dimension (padded to a power of two), X pieces of a unit, R heads of a block, G KV heads.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from core.kernels.dependent_launch import let_successor_start, wait_for_predecessor
from plugins.attention._decode_schedule import SCHEDULE_COLUMNS
from plugins.attention._triton_kernels import attend_tile


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


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["context_lens_ptr", "table_ptr"],
)
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    workspace_ptr,
    schedule_ptr,
    context_lens_ptr,
    table_ptr,
    q_stride,
    table_stride,
    SCALE_LOG2: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One stretch of the line. The workspace holds, float32, the normalised results of pieces
    (P, 2, GROUP, D), then the log2 of their sums (P, 2, GROUP)."""
    program = tl.program_id(0)
    # What a step's plan wrote was complete before the kernel before this one let this one start.
    schedule_ptr += program * SCHEDULE_COLUMNS
    sequence = tl.load(schedule_ptr, cache_modifier=".cg")
    kv_head = tl.load(schedule_ptr + 1, cache_modifier=".cg")
    tile = tl.load(schedule_ptr + 2, cache_modifier=".cg")
    num_left = tl.load(schedule_ptr + 3, cache_modifier=".cg")
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
    log_sums_ptr = workspace_ptr + tl.num_programs(0) * (2 * GROUP * HEAD_DIM)
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
            if num_mine == num_tiles:
                out_places_M = (sequence.to(tl.int64) * (G * GROUP) + heads_M) * HEAD_DIM
                tl.store(
                    out_ptr + out_places_M[:, None] + columns_D[None, :],
                    result_MD.to(out_ptr.dtype.element_ty),
                    mask=valid_MD,
                )
            else:
                begins = (tile == 0).to(tl.int32)
                places_M = (program * 2 + begins) * GROUP + rows_M
                tl.store(
                    workspace_ptr + places_M[:, None] * HEAD_DIM + columns_D[None, :],
                    result_MD,
                    mask=valid_MD,
                )
                tl.store(log_sums_ptr + places_M, most_M + tl.log2(sum_M), mask=valid_M)
        num_left -= num_mine
        tile *= 0
        kv_head += 1
        if (kv_head == G) | (num_tiles == 0):
            kv_head = 0
            sequence += 1


@triton.jit(
    do_not_specialize=["num_sequences"], do_not_specialize_on_alignment=["context_lens_ptr"]
)
def reduce_kernel(
    out_ptr,
    workspace_ptr,
    schedule_ptr,
    context_lens_ptr,
    num_sequences,
    P: tl.constexpr,
    FIRST_ROW: tl.constexpr,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK_R query heads of one unit in pieces, from the rows of the schedule that start at
    FIRST_ROW; also zeros for sequences without tokens, which are padding."""
    index = tl.program_id(0)
    rows_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    schedule_ptr += (FIRST_ROW + index) * SCHEDULE_COLUMNS
    sequence = tl.load(schedule_ptr + 4, cache_modifier=".cg")
    kv_head = tl.load(schedule_ptr + 5, cache_modifier=".cg")
    num_pieces = tl.load(schedule_ptr + 6, cache_modifier=".cg")
    program = tl.load(schedule_ptr + 7, cache_modifier=".cg")
    columns_D = tl.arange(0, BLOCK_D)
    valid_RD = (rows_R < GROUP)[:, None] & (columns_D < HEAD_DIM)[None, :]
    rows_R = tl.minimum(rows_R, GROUP - 1)  # those past the last one repeat it, and are not stored
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    if num_pieces > 0:
        log_sums_ptr = workspace_ptr + P * (2 * GROUP * HEAD_DIM)
        most_R = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
        total_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
        acc_RD = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
        for first in range(0, num_pieces, BLOCK_X):
            pieces_X = first + tl.arange(0, BLOCK_X)
            begins_X = (pieces_X == 0).to(tl.int32)
            places_XR = ((program + pieces_X) * 2 + begins_X)[:, None] * GROUP + rows_R[None, :]
            inside_X = pieces_X < num_pieces
            log_sums_XR = tl.load(
                log_sums_ptr + places_XR, mask=inside_X[:, None], other=float("-inf")
            )
            partial_XRD = tl.load(
                workspace_ptr + places_XR[:, :, None] * HEAD_DIM + columns_D[None, None, :],
                mask=inside_X[:, None, None] & (columns_D < HEAD_DIM)[None, None, :],
                other=0.0,
            )
            new_most_R = tl.maximum(most_R, tl.max(log_sums_XR, axis=0))
            weights_XR = tl.exp2(log_sums_XR - new_most_R[None, :])
            shrink_R = tl.exp2(most_R - new_most_R)
            added_RD = tl.sum(partial_XRD * weights_XR[:, :, None], axis=0)
            acc_RD = acc_RD * shrink_R[:, None] + added_RD
            total_R = total_R * shrink_R + tl.sum(weights_XR, axis=0)
            most_R = new_most_R
        heads_R = sequence.to(tl.int64) * (G * GROUP) + kv_head * GROUP + rows_R
        tl.store(
            out_ptr + heads_R[:, None] * HEAD_DIM + columns_D[None, :],
            (acc_RD / total_R[:, None]).to(out_ptr.dtype.element_ty),
            mask=valid_RD,
        )
    for padding in range(index, num_sequences, tl.num_programs(0)):
        if tl.load(context_lens_ptr + padding) == 0:
            for kv_head in range(G):
                heads_R = padding * (G * GROUP) + kv_head * GROUP + rows_R
                tl.store(
                    out_ptr + heads_R[:, None] * HEAD_DIM + columns_D[None, :],
                    tl.zeros((BLOCK_R, BLOCK_D), dtype=out_ptr.dtype.element_ty),
                    mask=valid_RD,
                )
