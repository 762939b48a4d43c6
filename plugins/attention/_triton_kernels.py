"""Triton kernels of paged attention: prefill, decode over splits of the context, and their sum.

Every kernel works on one KV head and packs its query heads into the rows of a tile, so that k and
v are loaded once a group. Slots past a sequence's own tokens are never read. Scores are kept in
units of log2. Any page size: each token of a tile looks its page up.

Shape legend: M rows of a tile (query tokens x query heads of the group), N tokens of a tile, D
head dimension (padded to a power of two), X splits of a context.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from plugins.attention._triton_softmax import grow_softmax

# Numbers that differ from step to step must not be specialised on (their being 1, or multiples of
# 16), nor must the alignment of tensors that are slices: each new variant is a second of compiling
# in the middle of serving.


@triton.jit
def _attend_tile(
    q_MD,
    most_M,
    sum_M,
    acc_MD,
    first_token,
    num_tokens,
    positions_M,
    table_ptr,
    k_ptr,
    v_ptr,
    page_stride,
    token_stride,
    scale_log2,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add one tile of tokens to the running softmax (largest score, sum, weighted values).

    Without MASKED every row sees every token of the tile, and all of them are the sequence's.
    """
    tokens_N = first_token + tl.arange(0, BLOCK_N)
    columns_D = tl.arange(0, BLOCK_D)
    inside_N = tokens_N < num_tokens
    pages_N = tl.load(table_ptr + tokens_N // PAGE_SIZE, mask=inside_N, other=0).to(tl.int64)
    slots_N = pages_N * page_stride + (tokens_N % PAGE_SIZE) * token_stride
    inside_ND = inside_N[:, None] & (columns_D[None, :] < HEAD_DIM)
    k_ND = tl.load(k_ptr + slots_N[:, None] + columns_D[None, :], mask=inside_ND, other=0.0)
    v_ND = tl.load(v_ptr + slots_N[:, None] + columns_D[None, :], mask=inside_ND, other=0.0)
    if WIDE:
        k_ND = k_ND.to(tl.float32)
        v_ND = v_ND.to(tl.float32)
    scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale_log2
    if MASKED:
        seen_MN = (tokens_N[None, :] <= positions_M[:, None]) & inside_N[None, :]
        scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
    weights_MN, most_M, sum_M, acc_MD = grow_softmax(scores_MN, most_M, sum_M, acc_MD)
    acc_MD = tl.dot(weights_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision="ieee")
    return most_M, sum_M, acc_MD


@triton.jit
def _find_sequence(starts_ptr, num_sequences, block, BLOCK_Q: tl.constexpr):
    """The sequence that `block` belongs to; the blocks of s begin at starts[s] // BLOCK_Q + s."""
    left = 0
    right = num_sequences
    while left < right:
        middle = (left + right) // 2
        if tl.load(starts_ptr + middle) // BLOCK_Q + middle <= block:
            left = middle + 1
        else:
            right = middle
    return left - 1


@triton.jit(
    do_not_specialize=["num_sequences", "table_stride"],
    do_not_specialize_on_alignment=["starts_ptr", "context_lens_ptr", "table_ptr"],
)
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    starts_ptr,
    context_lens_ptr,
    table_ptr,
    num_sequences,
    q_stride,
    q_head_stride,
    out_stride,
    out_head_stride,
    page_stride,
    token_stride,
    head_stride,
    table_stride,
    scale_log2,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M // GROUP new tokens of one sequence against all tokens that they see."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _find_sequence(starts_ptr, num_sequences, block, BLOCK_Q)
    start = tl.load(starts_ptr + sequence)
    num_rows = tl.load(starts_ptr + sequence + 1) - start
    first_row = (block - start // BLOCK_Q - sequence) * BLOCK_Q
    if first_row >= num_rows:
        return
    num_cached = tl.load(context_lens_ptr + sequence)
    first_position = num_cached - num_rows + first_row

    tile_M = tl.arange(0, BLOCK_M)
    columns_D = tl.arange(0, BLOCK_D)
    rows_M = first_row + tile_M // GROUP
    heads_M = kv_head * GROUP + tile_M % GROUP
    valid_M = (tile_M < BLOCK_Q * GROUP) & (rows_M < num_rows)
    valid_MD = valid_M[:, None] & (columns_D[None, :] < HEAD_DIM)
    places_M = (start + rows_M).to(tl.int64)
    q_places_M = places_M * q_stride + heads_M * q_head_stride
    q_MD = tl.load(q_ptr + q_places_M[:, None] + columns_D[None, :], mask=valid_MD, other=0.0)
    if WIDE:
        q_MD = q_MD.to(tl.float32)
    positions_M = first_position + tile_M // GROUP

    most_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    table_ptr += sequence.to(tl.int64) * table_stride
    k_ptr += kv_head * head_stride
    v_ptr += kv_head * head_stride
    num_tokens = tl.minimum(first_position + BLOCK_Q, num_cached)
    num_unmasked = (first_position + 1) // BLOCK_N * BLOCK_N
    for first_token in range(0, num_unmasked, BLOCK_N):
        most_M, sum_M, acc_MD = _attend_tile(
            q_MD, most_M, sum_M, acc_MD, first_token, num_tokens, positions_M, table_ptr,
            k_ptr, v_ptr, page_stride, token_stride, scale_log2,
            False, WIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for first_token in range(num_unmasked, num_tokens, BLOCK_N):
        most_M, sum_M, acc_MD = _attend_tile(
            q_MD, most_M, sum_M, acc_MD, first_token, num_tokens, positions_M, table_ptr,
            k_ptr, v_ptr, page_stride, token_stride, scale_log2,
            True, WIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    out_places_M = places_M * out_stride + heads_M * out_head_stride
    tl.store(
        out_ptr + out_places_M[:, None] + columns_D[None, :],
        (acc_MD / sum_M[:, None]).to(out_ptr.dtype.element_ty),
        mask=valid_MD,
    )


@triton.jit(
    do_not_specialize=["num_splits", "table_stride"],
    do_not_specialize_on_alignment=["context_lens_ptr", "table_ptr"],
)
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,
    log_sums_ptr,
    context_lens_ptr,
    table_ptr,
    q_stride,
    q_head_stride,
    out_stride,
    out_head_stride,
    page_stride,
    token_stride,
    head_stride,
    table_stride,
    scale_log2,
    num_splits,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The one new token of a sequence against one split of its context.

    With one split this writes `out`; with several, the normalised result (S, H, X, D) and the
    log2 of its sum (S, H, X), minus infinity for an empty split.
    """
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_cached = tl.load(context_lens_ptr + sequence)
    per_split = tl.cdiv(tl.cdiv(num_cached, num_splits), BLOCK_N) * BLOCK_N
    begin = split * per_split
    end = tl.minimum(begin + per_split, num_cached)

    rows_M = tl.arange(0, BLOCK_M)
    columns_D = tl.arange(0, BLOCK_D)
    valid_M = rows_M < GROUP
    heads_M = kv_head * GROUP + rows_M
    num_heads = tl.num_programs(1) * GROUP
    splits_M = (sequence.to(tl.int64) * num_heads + heads_M) * num_splits + split
    if begin >= end:
        tl.store(
            log_sums_ptr + splits_M, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=valid_M
        )
        return
    valid_MD = valid_M[:, None] & (columns_D[None, :] < HEAD_DIM)
    q_places_M = sequence.to(tl.int64) * q_stride + heads_M * q_head_stride
    q_MD = tl.load(q_ptr + q_places_M[:, None] + columns_D[None, :], mask=valid_MD, other=0.0)
    if WIDE:
        q_MD = q_MD.to(tl.float32)

    positions_M = tl.zeros((BLOCK_M,), dtype=tl.int32) + num_cached
    most_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    table_ptr += sequence.to(tl.int64) * table_stride
    k_ptr += kv_head * head_stride
    v_ptr += kv_head * head_stride
    for first_token in range(begin, end, BLOCK_N):
        most_M, sum_M, acc_MD = _attend_tile(
            q_MD, most_M, sum_M, acc_MD, first_token, end, positions_M, table_ptr,
            k_ptr, v_ptr, page_stride, token_stride, scale_log2,
            True, WIDE, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    result_MD = acc_MD / sum_M[:, None]
    if not SPLIT:
        out_places_M = sequence.to(tl.int64) * out_stride + heads_M * out_head_stride
        tl.store(
            out_ptr + out_places_M[:, None] + columns_D[None, :],
            result_MD.to(out_ptr.dtype.element_ty),
            mask=valid_MD,
        )
    else:
        tl.store(
            partial_ptr + splits_M[:, None] * HEAD_DIM + columns_D[None, :],
            result_MD,
            mask=valid_MD,
        )
        tl.store(log_sums_ptr + splits_M, most_M + tl.log2(sum_M), mask=valid_M)


@triton.jit(do_not_specialize=["num_splits"])
def reduce_kernel(
    partial_ptr,
    log_sums_ptr,
    out_ptr,
    out_stride,
    out_head_stride,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The attention of one head of one sequence from its splits; the first is never empty."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    splits_X = tl.arange(0, BLOCK_X)
    columns_D = tl.arange(0, BLOCK_D)
    places_X = (sequence * tl.num_programs(1) + head) * num_splits + splits_X
    log_sums_X = tl.load(log_sums_ptr + places_X, mask=splits_X < num_splits, other=float("-inf"))
    weights_X = tl.exp2(log_sums_X - tl.max(log_sums_X, axis=0))
    # An empty split's result was never written: it must not be read, were it only to weigh 0.
    written_XD = (weights_X[:, None] > 0.0) & (columns_D[None, :] < HEAD_DIM)
    partial_XD = tl.load(
        partial_ptr + places_X[:, None] * HEAD_DIM + columns_D[None, :], mask=written_XD, other=0.0
    )
    out_D = tl.sum(partial_XD * weights_X[:, None], axis=0) / tl.sum(weights_X, axis=0)
    tl.store(
        out_ptr + sequence * out_stride + head * out_head_stride + columns_D,
        out_D.to(out_ptr.dtype.element_ty),
        mask=columns_D < HEAD_DIM,
    )
