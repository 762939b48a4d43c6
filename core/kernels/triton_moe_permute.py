"""Grouping rows by expert, by counting, and the weighted sum of their results in Triton kernels.

For GPUs; on CPU tensors they run in Triton's interpreter (TRITON_INTERPRET=1), for tests. The
oracle is core.kernels.moe_permute. Shape legend: see there; P = T * K, B pairs of one program, Q
pairs or blocks looked at in one turn, X keys: experts and none.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_COLUMNS = 1024  # of one program: a long row is spread over several
_BLOCK = 128  # pairs of one program
_TURN = 16  # blocks whose counts are read at once
MOST_PAIRS = 65536  # every program reads the counts of all blocks: beyond, sort


@triton.jit
def count_pairs_kernel(
    experts_ptr, block_counts_ptr, num_pairs, num_experts, BLOCK: tl.constexpr, KEYS: tl.constexpr
):
    """Pairs of each key among those of one block; no expert is the key behind all others."""
    block = tl.program_id(0)
    pairs_B = block * BLOCK + tl.arange(0, BLOCK)
    inside_B = pairs_B < num_pairs
    experts_B = tl.load(experts_ptr + pairs_B, mask=inside_B, other=-1).to(tl.int32)
    keys_B = tl.where(experts_B < 0, num_experts, experts_B)
    keys_X = tl.arange(0, KEYS)
    same_BX = (keys_B[:, None] == keys_X[None, :]) & inside_B[:, None]
    tl.store(block_counts_ptr + block * KEYS + keys_X, tl.sum(same_BX.to(tl.int32), 0))


@triton.jit
def place_pairs_kernel(
    experts_ptr,
    block_counts_ptr,
    source_ptr,
    positions_ptr,
    counts_ptr,
    num_pairs,
    num_experts,
    num_blocks,
    top_k,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    TURN: tl.constexpr,
    ALONE: tl.constexpr,
):
    """A pair's place is the number of pairs before it: those of smaller keys, those of its own in
    earlier blocks, and the earlier ones of its own block. ALONE: this is the only block."""
    block = tl.program_id(0)
    keys_X = tl.arange(0, KEYS)
    counts_X = tl.zeros((KEYS,), tl.int32)
    before_X = tl.zeros((KEYS,), tl.int32)
    if ALONE:
        pairs_B = tl.arange(0, BLOCK)
        experts_B = tl.load(experts_ptr + pairs_B, mask=pairs_B < num_pairs, other=-1).to(tl.int32)
        keys_B = tl.where(experts_B < 0, num_experts, experts_B)
        counts_X += tl.sum((keys_B[:, None] == keys_X[None, :]).to(tl.int32), 0)
    else:
        for first in range(0, num_blocks, TURN):
            blocks_Q = first + tl.arange(0, TURN)
            offsets_QX = blocks_Q[:, None] * KEYS + keys_X[None, :]
            inside_QX = (blocks_Q < num_blocks)[:, None]
            counts_QX = tl.load(block_counts_ptr + offsets_QX, mask=inside_QX, other=0)
            counts_X += tl.sum(counts_QX, 0)
            before_X += tl.sum(tl.where((blocks_Q < block)[:, None], counts_QX, 0), 0)
    first_X = tl.cumsum(counts_X, 0) - counts_X + before_X
    pairs_B = block * BLOCK + tl.arange(0, BLOCK)
    inside_B = pairs_B < num_pairs
    experts_B = tl.load(experts_ptr + pairs_B, mask=inside_B, other=-1).to(tl.int32)
    keys_B = tl.where(experts_B < 0, num_experts, experts_B)
    pairs_Q = block * BLOCK + tl.arange(0, BLOCK)
    experts_Q = tl.load(experts_ptr + pairs_Q, mask=pairs_Q < num_pairs, other=-1).to(tl.int32)
    keys_Q = tl.where(experts_Q < 0, num_experts, experts_Q)
    # Pairs past the end come last, so that none counts for another.
    earlier_BQ = (keys_Q[None, :] == keys_B[:, None]) & (pairs_Q[None, :] < pairs_B[:, None])
    places_B = tl.sum(earlier_BQ.to(tl.int32), 1)
    places_B += tl.sum(tl.where(keys_B[:, None] == keys_X[None, :], first_X[None, :], 0), 1)
    tl.store(source_ptr + places_B, (pairs_B // top_k).to(tl.int64), mask=inside_B)
    places_B = tl.where(experts_B < 0, -1, places_B)
    tl.store(positions_ptr + pairs_B, places_B.to(tl.int64), mask=inside_B)
    if block == 0:
        tl.store(counts_ptr + keys_X, counts_X.to(tl.int64), mask=keys_X < num_experts)


def group_pairs(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(source (P,), counts_L, positions_TK) of at most `MOST_PAIRS` pairs, of which there is at
    least one; see core.kernels.moe_permute.group_rows."""
    experts_TK = experts_TK.contiguous()
    num_pairs, top_k = experts_TK.numel(), experts_TK.shape[1]
    device = experts_TK.device
    source = torch.empty(num_pairs, dtype=torch.int64, device=device)
    counts_L = torch.empty(num_experts, dtype=torch.int64, device=device)
    positions_TK = torch.empty_like(experts_TK)
    num_blocks = triton.cdiv(num_pairs, _BLOCK)
    num_keys = triton.next_power_of_2(num_experts + 1)
    block_counts = torch.empty((num_blocks, num_keys), dtype=torch.int32, device=device)
    if num_blocks > 1:
        count_pairs_kernel[(num_blocks,)](
            experts_TK,
            block_counts,
            num_pairs,
            num_experts,
            BLOCK=_BLOCK,
            KEYS=num_keys,
            num_warps=8,
        )
    place_pairs_kernel[(num_blocks,)](
        experts_TK,
        block_counts,
        source,
        positions_TK,
        counts_L,
        num_pairs,
        num_experts,
        num_blocks,
        top_k,
        BLOCK=_BLOCK,
        KEYS=num_keys,
        TURN=_TURN,
        ALONE=num_blocks == 1,
        num_warps=8,
    )
    return source, counts_L, positions_TK


@triton.jit
def sum_results_kernel(
    results_ptr,
    positions_ptr,
    weights_ptr,
    out_ptr,
    hidden_size,
    num_columns,
    WEIGHTED: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Part of one row: its results, read where they lie, added up in float32."""
    row = tl.program_id(0).to(tl.int64)
    columns_E = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total_E = tl.zeros((BLOCK_E,), tl.float32)
    for k in range(num_columns):
        position = tl.load(positions_ptr + row * num_columns + k)
        # What no position names may be NaN, so that it must not even be multiplied by 0.
        width = tl.where(position >= 0, hidden_size, 0)
        place_ptr = results_ptr + position.to(tl.int64) * hidden_size
        result_E = tl.load(place_ptr + columns_E, mask=columns_E < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            result_E *= tl.load(weights_ptr + row * num_columns + k)
        total_E += result_E
    out_E = total_E.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * hidden_size + columns_E, out_E, mask=columns_E < hidden_size)


def sum_results(
    results_ME: Tensor, positions_TK: Tensor, weights_TK: Tensor | None, out_TE: Tensor
) -> Tensor:
    """Fill `out_TE`; see core.kernels.moe_permute.sum_results."""
    num_rows, hidden_size = out_TE.shape
    block = min(triton.next_power_of_2(hidden_size), _MOST_COLUMNS)
    if num_rows:
        positions_TK = positions_TK.contiguous()
        sum_results_kernel[(num_rows, triton.cdiv(hidden_size, block))](
            results_ME.contiguous(),
            positions_TK,
            positions_TK if weights_TK is None else weights_TK.contiguous(),
            out_TE,
            hidden_size,
            positions_TK.shape[1],
            WEIGHTED=weights_TK is not None,
            BLOCK_E=block,
        )
    return out_TE
