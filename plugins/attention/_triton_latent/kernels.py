"""Triton kernel of expanded latent attention; the absorbed one is in _latent_decode_kernels.

Dimensions of keys lie in two tiles: 128 + 64 of them are not padded to 256, and the rotary ones,
which all heads share, are read from the cached vectors. Scores are kept in units of log2.

Shape legend: see core.interfaces.latent_attention; M rows of a tile (heads, or new tokens of one
head), N tokens of a tile, K splits of a row's context. C, R, N and V are padded to powers of two.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from plugins.attention._triton_heads.softmax import grow_softmax

# Numbers that differ from step to step must not be specialised on, nor must the alignment of
# tensors that are slices: each new variant is seconds of compiling in the middle of serving.


@triton.jit
def _attend_tile(
    q_MN,
    q_MR,
    most_M,
    sum_M,
    acc_MV,
    first_token,
    num_tokens,
    seen_M,
    k_ptr,
    k_rope_ptr,
    v_ptr,
    k_stride,
    k_rope_stride,
    v_stride,
    scale_log2,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Take a tile of T tokens in; without MASKED every row sees each of them."""
    tokens_T = first_token + tl.arange(0, BLOCK_T)
    columns_N = tl.arange(0, BLOCK_N)
    columns_R = tl.arange(0, BLOCK_R)
    columns_V = tl.arange(0, BLOCK_V)
    inside_T1 = (tokens_T < num_tokens)[:, None]
    k_ptr_T1 = k_ptr + tokens_T[:, None].to(tl.int64) * k_stride
    v_ptr_T1 = v_ptr + tokens_T[:, None].to(tl.int64) * v_stride
    k_TN = tl.load(
        k_ptr_T1 + columns_N[None, :], mask=inside_T1 & (columns_N < NOPE_DIM)[None, :], other=0.0
    )
    k_TR = tl.load(
        k_rope_ptr + tokens_T[:, None].to(tl.int64) * k_rope_stride + columns_R[None, :],
        mask=inside_T1 & (columns_R < ROPE_DIM)[None, :],
        other=0.0,
    )
    v_TV = tl.load(
        v_ptr_T1 + columns_V[None, :], mask=inside_T1 & (columns_V < VALUE_DIM)[None, :], other=0.0
    )
    if WIDE:
        k_TN = k_TN.to(tl.float32)
        k_TR = k_TR.to(tl.float32)
        v_TV = v_TV.to(tl.float32)
    scores_MT = tl.dot(q_MN, tl.trans(k_TN), input_precision="ieee")
    scores_MT = tl.dot(q_MR, tl.trans(k_TR), scores_MT, input_precision="ieee") * scale_log2
    if MASKED:
        visible_MT = (tokens_T[None, :] <= seen_M[:, None]) & (tokens_T < num_tokens)[None, :]
        scores_MT = tl.where(visible_MT, scores_MT, float("-inf"))
    weights_MT, most_M, sum_M, acc_MV = grow_softmax(scores_MT, most_M, sum_M, acc_MV)
    acc_MV = tl.dot(weights_MT.to(v_TV.dtype), v_TV, acc_MV, input_precision="ieee")
    return most_M, sum_M, acc_MV


@triton.jit(do_not_specialize_on_alignment=["blocks_ptr"])
def expanded_kernel(
    q_ptr,
    k_ptr,
    k_rope_ptr,
    v_ptr,
    out_ptr,
    state_ptr,
    log_sums_ptr,
    blocks_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    k_rope_stride,
    v_stride,
    v_head_stride,
    out_stride,
    out_head_stride,
    scale_log2,
    STATE: tl.constexpr,
    WIDE: tl.constexpr,
    NOPE_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Some new tokens of one sequence, one head, against the expanded tokens of one piece.

    A block is (first row in the step, rows, position of the first, place of the piece's first token
    in k and v, its position, tokens of the piece). With STATE a row may see several pieces, one
    launch after the other: in between, its normalised result and the log2 of its sum are kept.
    """
    block_ptr = blocks_ptr + tl.program_id(0) * 6
    first_row = tl.load(block_ptr)
    num_rows = tl.load(block_ptr + 1)
    position = tl.load(block_ptr + 2)
    place = tl.load(block_ptr + 3).to(tl.int64)
    piece_token = tl.load(block_ptr + 4)
    piece_tokens = tl.load(block_ptr + 5)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)

    tile_M = tl.arange(0, BLOCK_M)
    columns_N = tl.arange(0, BLOCK_N)
    columns_R = tl.arange(0, BLOCK_R)
    columns_V = tl.arange(0, BLOCK_V)
    valid_M1 = (tile_M < num_rows)[:, None]
    valid_MV = valid_M1 & (columns_V < VALUE_DIM)[None, :]
    rows_M = (first_row + tile_M).to(tl.int64)
    q_ptr_M1 = q_ptr + rows_M[:, None] * q_stride + head * q_head_stride
    q_MN = tl.load(
        q_ptr_M1 + columns_N[None, :], mask=valid_M1 & (columns_N < NOPE_DIM)[None, :], other=0.0
    )
    q_MR = tl.load(
        q_ptr_M1 + NOPE_DIM + columns_R[None, :],
        mask=valid_M1 & (columns_R < ROPE_DIM)[None, :],
        other=0.0,
    )
    if WIDE:
        q_MN = q_MN.to(tl.float32)
        q_MR = q_MR.to(tl.float32)

    most_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc_MV = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    states_M = rows_M * num_heads + head
    state_ptr_MV = state_ptr + states_M[:, None] * VALUE_DIM + columns_V[None, :]
    if STATE and piece_token > 0:
        # A normalised result is a sum of weights of 1 at its log-sum.
        most_M = tl.load(log_sums_ptr + states_M, mask=tile_M < num_rows, other=0.0)
        sum_M += 1.0
        acc_MV = tl.load(state_ptr_MV, mask=valid_MV, other=0.0)

    k_ptr += place * k_stride + head * k_head_stride
    k_rope_ptr += place * k_rope_stride
    v_ptr += place * v_stride + head * v_head_stride
    seen_M = position - piece_token + tile_M  # the last token of the piece that a row sees
    num_tokens = tl.minimum(position + num_rows - piece_token, piece_tokens)
    num_unmasked = tl.minimum(position + 1 - piece_token, num_tokens) // BLOCK_T * BLOCK_T
    for first_token in range(0, num_unmasked, BLOCK_T):
        most_M, sum_M, acc_MV = _attend_tile(
            q_MN, q_MR, most_M, sum_M, acc_MV, first_token, num_tokens, seen_M,
            k_ptr, k_rope_ptr, v_ptr, k_stride, k_rope_stride, v_stride, scale_log2, False, WIDE,
            NOPE_DIM, ROPE_DIM, VALUE_DIM, BLOCK_T, BLOCK_N, BLOCK_R, BLOCK_V,
        )  # fmt: skip
    for first_token in range(num_unmasked, num_tokens, BLOCK_T):
        most_M, sum_M, acc_MV = _attend_tile(
            q_MN, q_MR, most_M, sum_M, acc_MV, first_token, num_tokens, seen_M,
            k_ptr, k_rope_ptr, v_ptr, k_stride, k_rope_stride, v_stride, scale_log2, True, WIDE,
            NOPE_DIM, ROPE_DIM, VALUE_DIM, BLOCK_T, BLOCK_N, BLOCK_R, BLOCK_V,
        )  # fmt: skip

    result_MV = acc_MV / sum_M[:, None]
    stored_MV = valid_MV
    if STATE:
        finished_M = seen_M < piece_tokens
        stored_MV = valid_MV & finished_M[:, None]
        unfinished_M = (tile_M < num_rows) & (seen_M >= piece_tokens)
        tl.store(state_ptr_MV, result_MV, mask=valid_MV & unfinished_M[:, None])
        tl.store(log_sums_ptr + states_M, most_M + tl.log2(sum_M), mask=unfinished_M)
    out_ptr_M1 = out_ptr + rows_M[:, None] * out_stride + head * out_head_stride
    tl.store(
        out_ptr_M1 + columns_V[None, :], result_MV.to(out_ptr.dtype.element_ty), mask=stored_MV
    )
