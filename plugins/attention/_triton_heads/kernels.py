"""Triton kernel of paged prefill, and the step over one tile of tokens that decode shares.

A program works on one KV head and packs its query heads into the rows of a tile, so that k and
v are loaded once a group. Slots past a sequence's own tokens are never read. Scores are kept in
units of log2. Any page size: each token of a tile looks its page up.

Shape legend: M rows of a tile (query tokens x query heads of the group), N tokens of a tile, D
head dimension (padded to a power of two), G KV heads.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from plugins.attention._triton_heads.softmax import grow_softmax

# Numbers that differ from step to step must not be specialised on (their being 1, or multiples of
# 16), nor must the alignment of tensors that are slices: each new variant is a second of compiling
# in the middle of serving.


@triton.jit
def attend_tile(
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
    SCALE_LOG2: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    G: tl.constexpr,
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
    slots_N = (pages_N * PAGE_SIZE + tokens_N % PAGE_SIZE) * (G * HEAD_DIM)
    inside_ND = inside_N[:, None] & (columns_D[None, :] < HEAD_DIM)
    k_ND = tl.load(k_ptr + slots_N[:, None] + columns_D[None, :], mask=inside_ND, other=0.0)
    v_ND = tl.load(v_ptr + slots_N[:, None] + columns_D[None, :], mask=inside_ND, other=0.0)
    if WIDE:
        k_ND = k_ND.to(tl.float32)
        v_ND = v_ND.to(tl.float32)
    scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * SCALE_LOG2
    if MASKED:
        seen_MN = (tokens_N[None, :] <= positions_M[:, None]) & inside_N[None, :]
        scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
    weights_MN, most_M, sum_M, acc_MD = grow_softmax(scores_MN, most_M, sum_M, acc_MD)
    acc_MD = tl.dot(weights_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision="ieee")
    return most_M, sum_M, acc_MD


@triton.jit
def find_sequence(starts_ptr, num_sequences, block, BLOCK_Q: tl.constexpr, MORE: tl.constexpr = 1):
    """The sequence that `block` belongs to; those of sequence s begin at block
    starts[s] // BLOCK_Q + MORE * s."""
    left = 0
    right = num_sequences
    while left < right:
        middle = (left + right) // 2
        if tl.load(starts_ptr + middle) // BLOCK_Q + MORE * middle <= block:
            left = middle + 1
        else:
            right = middle
    return left - 1


@triton.jit
def _zero_rows(
    out_ptr,
    first_row,
    most_rows,
    first_head,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Zeros for as many rows as a block has, in the query heads of one KV head."""
    tile_M = tl.arange(0, BLOCK_M)
    columns_D = tl.arange(0, BLOCK_D)
    rows_M = first_row + tile_M // GROUP
    places_M = (rows_M.to(tl.int64) * (G * GROUP) + first_head + tile_M % GROUP) * HEAD_DIM
    inside_M = (tile_M < BLOCK_M // GROUP * GROUP) & (rows_M < most_rows)
    tl.store(
        out_ptr + places_M[:, None] + columns_D[None, :],
        tl.zeros((BLOCK_M, BLOCK_D), dtype=out_ptr.dtype.element_ty),
        mask=inside_M[:, None] & (columns_D[None, :] < HEAD_DIM),
    )


@triton.jit(
    do_not_specialize=["num_sequences", "most_rows", "table_stride"],
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
    most_rows,
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
):
    """BLOCK_M // GROUP new tokens of one sequence against all tokens that they see.

    Blocks past those of the sequences write zeros to rows that no sequence has, of `most_rows`.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = find_sequence(starts_ptr, num_sequences, block, BLOCK_Q)
    start = tl.load(starts_ptr + sequence)
    num_rows = tl.load(starts_ptr + sequence + 1) - start
    first_row = (block - start // BLOCK_Q - sequence) * BLOCK_Q
    if first_row >= num_rows:
        num_used = tl.load(starts_ptr + num_sequences)
        surplus = block - num_used // BLOCK_Q - num_sequences
        if surplus >= 0:
            _zero_rows(
                out_ptr, num_used + surplus * BLOCK_Q, most_rows, kv_head * GROUP,
                GROUP, G, HEAD_DIM, BLOCK_M, BLOCK_D,
            )  # fmt: skip
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
    q_places_M = places_M * q_stride + heads_M * HEAD_DIM
    q_MD = tl.load(q_ptr + q_places_M[:, None] + columns_D[None, :], mask=valid_MD, other=0.0)
    if WIDE:
        q_MD = q_MD.to(tl.float32)
    positions_M = first_position + tile_M // GROUP

    most_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    table_ptr += sequence.to(tl.int64) * table_stride
    k_ptr += kv_head * HEAD_DIM
    v_ptr += kv_head * HEAD_DIM
    num_tokens = tl.minimum(first_position + BLOCK_Q, num_cached)
    num_unmasked = (first_position + 1) // BLOCK_N * BLOCK_N
    for first_token in range(0, num_unmasked, BLOCK_N):
        most_M, sum_M, acc_MD = attend_tile(
            q_MD, most_M, sum_M, acc_MD, first_token, num_tokens, positions_M, table_ptr,
            k_ptr, v_ptr, SCALE_LOG2, False, WIDE, G, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for first_token in range(num_unmasked, num_tokens, BLOCK_N):
        most_M, sum_M, acc_MD = attend_tile(
            q_MD, most_M, sum_M, acc_MD, first_token, num_tokens, positions_M, table_ptr,
            k_ptr, v_ptr, SCALE_LOG2, True, WIDE, G, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    out_places_M = (places_M * (G * GROUP) + heads_M) * HEAD_DIM
    tl.store(
        out_ptr + out_places_M[:, None] + columns_D[None, :],
        (acc_MD / sum_M[:, None]).to(out_ptr.dtype.element_ty),
        mask=valid_MD,
    )
