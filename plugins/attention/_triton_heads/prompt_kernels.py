"""Triton kernel of attention for prompts: new rows by tensor descriptors, their prefix by pages.

The keys and values of a step's new rows lie in the projection's result, row after row: the copy
engine brings tiles of them in. Only what was cached before is looked up page by page. Lengths are
read on the device: a captured step may have fewer rows and sequences than it was captured for.
Every query head of a block of rows is a program of its own, the longest contexts first.

Shape legend: M new rows of a tile, N tokens of a tile, D head dimension (a power of two), H and G
query and KV heads.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from plugins.attention._triton_heads.kernels import find_sequence


@triton.jit(
    do_not_specialize=["num_sequences", "num_blocks", "most_rows"],
    do_not_specialize_on_alignment=["starts_ptr", "context_lens_ptr"],
)
def blocks_kernel(
    starts_ptr,
    context_lens_ptr,
    blocks_ptr,
    num_sequences,
    num_blocks,
    most_rows,
    PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What plugins.attention._triton_heads.prompt_gluon_kernels takes block after block: BLOCK_M
    rows of one sequence, the last ones of each first, and rows beyond those of all sequences.
    Blocks begin at positions that BLOCK_M divides: with PREFIX the first one may begin before the
    new rows."""
    MORE: tl.constexpr = 2 if PREFIX else 1  # blocks than BLOCK_M divides a sequence's rows in
    block = num_blocks - 1 - tl.program_id(0)
    blocks_ptr += tl.program_id(0) * 5
    sequence = find_sequence(starts_ptr, num_sequences, block, BLOCK_M, MORE)
    start = tl.load(starts_ptr + sequence)
    num_rows = tl.load(starts_ptr + sequence + 1) - start
    position = (block - start // BLOCK_M - MORE * sequence) * BLOCK_M
    num_before = 0
    if PREFIX:
        num_before = tl.load(context_lens_ptr + sequence) - num_rows
        position += num_before // BLOCK_M * BLOCK_M
    first_row = position - num_before
    if first_row >= num_rows:
        num_used = tl.load(starts_ptr + num_sequences)
        surplus = block - num_used // BLOCK_M - MORE * num_sequences
        start = num_used + tl.maximum(surplus, 0) * BLOCK_M
        num_rows = tl.where(surplus < 0, 0, tl.minimum(most_rows - start, BLOCK_M))
        first_row = 0
        position = -1
    tl.store(blocks_ptr, start)
    tl.store(blocks_ptr + 1, first_row)
    tl.store(blocks_ptr + 2, num_rows)
    tl.store(blocks_ptr + 3, position)
    tl.store(blocks_ptr + 4, sequence)


@triton.jit
def _take_in(
    q_MD, k_ND, v_ND, seen_MN, most_M, sum_M, acc_MD,
    SCALE_LOG2: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add a tile of tokens to the running softmax, whose first tile every row sees a token of."""
    if WIDE:
        k_ND = k_ND.to(tl.float32)
        v_ND = v_ND.to(tl.float32)
    scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
    if MASKED:
        scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
    # The scale is positive: it can wait until after the largest was found.
    new_most_M = tl.maximum(most_M, tl.max(scores_MN, axis=1) * SCALE_LOG2)
    weights_MN = tl.exp2(scores_MN * SCALE_LOG2 - new_most_M[:, None])
    shrink_M = tl.exp2(most_M - new_most_M)
    sum_M = sum_M * shrink_M + tl.sum(weights_MN, axis=1)
    acc_MD = acc_MD * shrink_M[:, None]
    acc_MD = tl.dot(weights_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision="ieee")
    return new_most_M, sum_M, acc_MD


@triton.jit(
    do_not_specialize=["num_sequences", "num_blocks", "most_rows", "table_stride"],
    do_not_specialize_on_alignment=["starts_ptr", "context_lens_ptr", "table_ptr"],
)
def prompt_kernel(
    q_desc,
    k_desc,
    v_desc,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    starts_ptr,
    context_lens_ptr,
    table_ptr,
    num_sequences,
    num_blocks,
    most_rows,
    table_stride,
    SCALE_LOG2: tl.constexpr,
    PREFIX: tl.constexpr,
    WIDE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M new rows of one sequence in one query head. Rows beyond those of all sequences, of
    `most_rows`, become zero. Without PREFIX no sequence has cached tokens before its new ones."""
    head = tl.program_id(0)
    block = num_blocks - 1 - tl.program_id(1)
    sequence = find_sequence(starts_ptr, num_sequences, block, BLOCK_M)
    start = tl.load(starts_ptr + sequence)
    num_rows = tl.load(starts_ptr + sequence + 1) - start
    first_row = (block - start // BLOCK_M - sequence) * BLOCK_M
    rows_M = first_row + tl.arange(0, BLOCK_M)
    columns_D = tl.arange(0, HEAD_DIM)
    if first_row >= num_rows:
        num_used = tl.load(starts_ptr + num_sequences)
        surplus = block - num_used // BLOCK_M - num_sequences
        if surplus >= 0:
            unused_M = num_used + surplus * BLOCK_M + tl.arange(0, BLOCK_M)
            places_M = (unused_M.to(tl.int64) * H + head) * HEAD_DIM
            tl.store(
                out_ptr + places_M[:, None] + columns_D[None, :],
                tl.zeros((BLOCK_M, HEAD_DIM), dtype=out_ptr.dtype.element_ty),
                mask=(unused_M < most_rows)[:, None],
            )
        return
    kv_column = head // (H // G) * HEAD_DIM
    q_MD = q_desc.load([start + first_row, head * HEAD_DIM])
    if WIDE:
        q_MD = q_MD.to(tl.float32)
    most_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc_MD = tl.zeros((BLOCK_M, HEAD_DIM), dtype=tl.float32)
    tokens_N = tl.arange(0, BLOCK_N)
    if PREFIX:
        num_before = tl.load(context_lens_ptr + sequence) - num_rows
        table_ptr += sequence.to(tl.int64) * table_stride
        for token in range(0, num_before, BLOCK_N):
            inside_N = token + tokens_N < num_before
            pages_N = tl.load(
                table_ptr + (token + tokens_N) // PAGE_SIZE, mask=inside_N, other=0
            ).to(tl.int64)
            slots_N = pages_N * PAGE_SIZE + (token + tokens_N) % PAGE_SIZE
            places_ND = (slots_N * (G * HEAD_DIM))[:, None] + (kv_column + columns_D)[None, :]
            k_ND = tl.load(k_cache_ptr + places_ND, mask=inside_N[:, None], other=0.0)
            v_ND = tl.load(v_cache_ptr + places_ND, mask=inside_N[:, None], other=0.0)
            most_M, sum_M, acc_MD = _take_in(
                q_MD, k_ND, v_ND, inside_N[None, :], most_M, sum_M, acc_MD, SCALE_LOG2, True, WIDE
            )
    # What follows a sequence's last row belongs to others; only rows before their own are seen.
    num_unmasked = first_row // BLOCK_N * BLOCK_N
    for token in range(0, num_unmasked, BLOCK_N):
        k_ND = k_desc.load([start + token, kv_column])
        v_ND = v_desc.load([start + token, kv_column])
        most_M, sum_M, acc_MD = _take_in(
            q_MD, k_ND, v_ND, None, most_M, sum_M, acc_MD, SCALE_LOG2, False, WIDE
        )
    for token in range(num_unmasked, tl.minimum(first_row + BLOCK_M, num_rows), BLOCK_N):
        k_ND = k_desc.load([start + token, kv_column])
        v_ND = v_desc.load([start + token, kv_column])
        seen_MN = (token + tokens_N)[None, :] <= rows_M[:, None]
        if token + BLOCK_N > num_rows:  # a weight of 0 doesn't keep another's NaN out
            v_ND = tl.where((token + tokens_N < num_rows)[:, None], v_ND, 0.0)
        most_M, sum_M, acc_MD = _take_in(
            q_MD, k_ND, v_ND, seen_MN, most_M, sum_M, acc_MD, SCALE_LOG2, True, WIDE
        )
    places_M = ((start + rows_M).to(tl.int64) * H + head) * HEAD_DIM
    tl.store(
        out_ptr + places_M[:, None] + columns_D[None, :],
        (acc_MD / sum_M[:, None]).to(out_ptr.dtype.element_ty),
        mask=(rows_M < num_rows)[:, None],
    )
