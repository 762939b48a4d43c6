"""Triton kernel of absorbed latent attention: pieces of a line of tiles.

plugins.attention._triton_heads.decode_schedule explains that line; pieces are summed as those of
heads are. All heads of a row are one unit of the line; blocks of heads run side by side, so that
one finds in the L2 cache what another one loaded.

Dimensions lie in two tiles, so that 512 + 64 of them are not padded to 1,024; a tile of latents is
loaded once and serves as keys and as values. Where a tile of tokens lies in one page it is a block
of memory, which the tensor memory accelerator copies; the last tile of a sequence is loaded by
token, as slots past its own tokens must not be read. Scores are kept in units of log2.

Shape legend: see core.interfaces.latent_attention; M heads of a tile, N tokens of a tile, P
programs (splits of the line). C and R are padded to powers of two.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from core.gpu_tools.dependent_launch import let_successor_start, wait_for_predecessor
from plugins.attention._triton_heads.decode_schedule import SCHEDULE_COLUMNS
from plugins.attention._triton_heads.softmax import grow_softmax


@triton.jit
def _attend(
    q_MC, q_MR, latent_NC, rope_NR, inside_N, most_M, sum_M, acc_MC,
    SCALE_LOG2: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Take a tile of tokens in; without MASKED all of them are the sequence's."""
    if WIDE:
        latent_NC = latent_NC.to(tl.float32)
        rope_NR = rope_NR.to(tl.float32)
    scores_MN = tl.dot(q_MR, tl.trans(rope_NR), input_precision="ieee")
    scores_MN = tl.dot(q_MC, tl.trans(latent_NC), scores_MN, input_precision="ieee") * SCALE_LOG2
    if MASKED:
        scores_MN = tl.where(inside_N[None, :], scores_MN, float("-inf"))
    weights_MN, most_M, sum_M, acc_MC = grow_softmax(scores_MN, most_M, sum_M, acc_MC)
    acc_MC = tl.dot(weights_MN.to(latent_NC.dtype), latent_NC, acc_MC, input_precision="ieee")
    return most_M, sum_M, acc_MC


@triton.jit
def _load_tokens(
    cache_ptr, table_ptr, first_token, end_token,
    PAGE_SIZE: tl.constexpr, LATENT_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of latents, of their rotary parts, and which of its tokens come before the end."""
    tokens_N = first_token + tl.arange(0, BLOCK_N)
    columns_C = tl.arange(0, BLOCK_C)
    columns_R = tl.arange(0, BLOCK_R)
    inside_N = tokens_N < end_token
    pages_N = tl.load(table_ptr + tokens_N // PAGE_SIZE, mask=inside_N, other=0).to(tl.int64)
    # Triton 3.6 takes the sum for as aligned as the first token of a page, and would read 16 bytes
    # where vectors of odd sizes are aligned to 8; it knows nothing of a number that was a float.
    offsets_N = (tokens_N % PAGE_SIZE).to(tl.float32).to(tl.int64)
    slots_N = pages_N * PAGE_SIZE + offsets_N
    vectors_ptr_N1 = cache_ptr + slots_N[:, None] * (LATENT_DIM + ROPE_DIM)
    latent_NC = tl.load(
        vectors_ptr_N1 + columns_C[None, :],
        mask=inside_N[:, None] & (columns_C < LATENT_DIM)[None, :],
        other=0.0,
    )
    rope_NR = tl.load(
        vectors_ptr_N1 + LATENT_DIM + columns_R[None, :],
        mask=inside_N[:, None] & (columns_R < ROPE_DIM)[None, :],
        other=0.0,
    )
    return latent_NC, rope_NR, inside_N


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["context_lens_ptr", "table_ptr"],
)
def latent_decode_kernel(
    q_latent_ptr,
    q_rope_ptr,
    q_rope_stride_T,
    q_rope_stride_H,
    cache_ptr,
    latent_blocks,
    rope_blocks,
    out_ptr,
    workspace_ptr,
    schedule_ptr,
    context_lens_ptr,
    table_ptr,
    table_stride,
    SCALE_LOG2: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A block of heads over one split of the line. The workspace holds, float32, the normalised
    results of pieces (P, 2, H, C), then the log2 of their sums (P, 2, H). With BLOCKS the two
    descriptors are those of tiles of the cache; each tile then lies in one page."""
    NUM_BLOCKS: tl.constexpr = (NUM_HEADS + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0) // NUM_BLOCKS
    num_programs = tl.num_programs(0) // NUM_BLOCKS
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    schedule_ptr += program * SCHEDULE_COLUMNS
    sequence = tl.load(schedule_ptr)
    tile = tl.load(schedule_ptr + 2)
    num_left = tl.load(schedule_ptr + 3)

    heads_M = tl.program_id(0) % NUM_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    columns_C = tl.arange(0, BLOCK_C)
    columns_R = tl.arange(0, BLOCK_R)
    valid_M = heads_M < NUM_HEADS
    valid_MC = valid_M[:, None] & (columns_C < LATENT_DIM)[None, :]
    valid_MR = valid_M[:, None] & (columns_R < ROPE_DIM)[None, :]
    log_sums_ptr = workspace_ptr + num_programs * (2 * NUM_HEADS * LATENT_DIM)
    while num_left > 0:
        num_cached = tl.load(context_lens_ptr + sequence)
        num_tiles = tl.cdiv(num_cached, BLOCK_N)
        num_mine = tl.minimum(num_tiles - tile, num_left)
        if num_mine > 0:
            rows_M = sequence.to(tl.int64) * NUM_HEADS + heads_M
            places_MC = rows_M[:, None] * LATENT_DIM + columns_C[None, :]
            q_MC = tl.load(q_latent_ptr + places_MC, mask=valid_MC, other=0.0)
            places_M = sequence.to(tl.int64) * q_rope_stride_T + heads_M * q_rope_stride_H
            places_MR = places_M[:, None] + columns_R[None, :]
            q_MR = tl.load(q_rope_ptr + places_MR, mask=valid_MR, other=0.0)
            if WIDE:
                q_MC = q_MC.to(tl.float32)
                q_MR = q_MR.to(tl.float32)
            most_M = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
            acc_MC = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
            table_row_ptr = table_ptr + sequence.to(tl.int64) * table_stride
            end_token = tl.minimum((tile + num_mine) * BLOCK_N, num_cached)
            by_token = tile * BLOCK_N
            if BLOCKS:
                by_token = end_token // BLOCK_N * BLOCK_N
                for token in range(tile * BLOCK_N, by_token, BLOCK_N):
                    page = tl.load(table_row_ptr + token // PAGE_SIZE)
                    slot = page * PAGE_SIZE + token % PAGE_SIZE
                    latent_NC = latent_blocks.load([slot, 0])
                    rope_NR = rope_blocks.load([slot, LATENT_DIM])
                    most_M, sum_M, acc_MC = _attend(
                        q_MC, q_MR, latent_NC, rope_NR, valid_M, most_M, sum_M, acc_MC,
                        SCALE_LOG2, False, WIDE,
                    )  # fmt: skip
            for token in range(by_token, end_token, BLOCK_N):
                latent_NC, rope_NR, inside_N = _load_tokens(
                    cache_ptr, table_row_ptr, token, end_token,
                    PAGE_SIZE, LATENT_DIM, ROPE_DIM, BLOCK_N, BLOCK_C, BLOCK_R,
                )  # fmt: skip
                most_M, sum_M, acc_MC = _attend(
                    q_MC, q_MR, latent_NC, rope_NR, inside_N, most_M, sum_M, acc_MC,
                    SCALE_LOG2, True, WIDE,
                )  # fmt: skip
            result_MC = acc_MC / sum_M[:, None]
            if num_mine == num_tiles:
                tl.store(
                    out_ptr + places_MC,
                    result_MC.to(out_ptr.dtype.element_ty),
                    mask=valid_MC,
                )
            else:
                begins = (tile == 0).to(tl.int32)
                pieces_M = (program * 2 + begins) * NUM_HEADS + heads_M
                tl.store(
                    workspace_ptr + pieces_M[:, None] * LATENT_DIM + columns_C[None, :],
                    result_MC,
                    mask=valid_MC,
                )
                tl.store(log_sums_ptr + pieces_M, most_M + tl.log2(sum_M), mask=valid_M)
        num_left -= num_mine
        tile *= 0
        sequence += 1
