"""Triton kernel that sums the pieces of units of absorbed latent attention.

plugins.attention._triton_heads.decode_schedule explains units and pieces. A unit's many heads are
summed side by side, by programs of their own. Shape legend: D latent dimensions (padded to a power
of two), X pieces of a unit, R heads of a block, G KV heads.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from core.gpu_tools.dependent_launch import let_successor_start, wait_for_predecessor
from plugins.attention._triton_heads.decode_schedule import SCHEDULE_COLUMNS


@triton.jit(
    do_not_specialize=["num_sequences"], do_not_specialize_on_alignment=["context_lens_ptr"]
)
def sum_kernel(
    out_ptr,
    workspace_ptr,
    schedule_ptr,
    context_lens_ptr,
    num_sequences,
    NUM_STRETCHES: tl.constexpr,
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
    split = tl.load(schedule_ptr + 7, cache_modifier=".cg")
    columns_D = tl.arange(0, BLOCK_D)
    valid_RD = (rows_R < GROUP)[:, None] & (columns_D < HEAD_DIM)[None, :]
    rows_R = tl.minimum(rows_R, GROUP - 1)  # those past the last one repeat it, and are not stored
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    if num_pieces > 0:
        log_sums_ptr = workspace_ptr + NUM_STRETCHES * (2 * GROUP * HEAD_DIM)
        most_R = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
        total_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
        acc_RD = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
        for first in range(0, num_pieces, BLOCK_X):
            pieces_X = first + tl.arange(0, BLOCK_X)
            begins_X = (pieces_X == 0).to(tl.int32)
            places_XR = ((split + pieces_X) * 2 + begins_X)[:, None] * GROUP + rows_R[None, :]
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
