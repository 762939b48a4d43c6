"""Grouping rows by expert and the weighted sum of their results, one Triton kernel each.

For GPUs; on CPU tensors they run in Triton's interpreter (TRITON_INTERPRET=1), for tests. The
oracle is core.kernels.moe_permute. Shape legend: see there; P = T * K, B pairs of one program, Q
pairs looked at in one turn.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_COLUMNS = 1024  # of one program: a long row is spread over several
_BLOCK = 64  # pairs or experts of one program of `group_pairs_kernel`, and pairs of a turn
MOST_PAIRS = 8192  # that are grouped by comparing each with each; a sort is faster beyond


@triton.jit
def group_pairs_kernel(
    experts_ptr,
    source_ptr,
    positions_ptr,
    counts_ptr,
    num_pairs,
    num_experts,
    num_pair_programs,
    top_k,
    BLOCK: tl.constexpr,
):
    """A pair's place is the number of pairs before it: those of smaller experts, and the earlier
    ones of its own. The first programs place pairs, the others count those of each expert."""
    program = tl.program_id(0)
    others_Q = tl.arange(0, BLOCK)
    if program < num_pair_programs:
        pairs_B = program * BLOCK + tl.arange(0, BLOCK)
        inside_B = pairs_B < num_pairs
        mine_B = tl.load(experts_ptr + pairs_B, mask=inside_B, other=-1)
        keys_B = tl.where(mine_B < 0, num_experts, mine_B)  # no expert: behind all others
        places_B = tl.zeros((BLOCK,), tl.int64)
        for first in range(0, num_pairs, BLOCK):
            index_Q = first + others_Q
            theirs_Q = tl.load(experts_ptr + index_Q, mask=index_Q < num_pairs, other=0)
            keys_Q = tl.where(theirs_Q < 0, num_experts, theirs_Q)
            keys_Q = tl.where(index_Q < num_pairs, keys_Q, num_experts + 1)
            smaller_BQ = keys_Q[None, :] < keys_B[:, None]
            earlier_BQ = keys_Q[None, :] == keys_B[:, None]
            earlier_BQ = tl.where(index_Q[None, :] < pairs_B[:, None], earlier_BQ, False)
            places_B += tl.sum(smaller_BQ.to(tl.int32) + earlier_BQ.to(tl.int32), 1)
        tl.store(source_ptr + places_B, (pairs_B // top_k).to(tl.int64), mask=inside_B)
        tl.store(positions_ptr + pairs_B, tl.where(mine_B < 0, -1, places_B), mask=inside_B)
    else:
        experts_B = (program - num_pair_programs) * BLOCK + tl.arange(0, BLOCK)
        counts_B = tl.zeros((BLOCK,), tl.int64)
        for first in range(0, num_pairs, BLOCK):
            index_Q = first + others_Q
            theirs_Q = tl.load(experts_ptr + index_Q, mask=index_Q < num_pairs, other=-1)
            counts_B += tl.sum((theirs_Q[None, :] == experts_B[:, None]).to(tl.int32), 1)
        tl.store(counts_ptr + experts_B, counts_B, mask=experts_B < num_experts)


def group_pairs(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(source (P,), counts_L, positions_TK) of at most `MOST_PAIRS` pairs, of which there is at
    least one; see core.kernels.moe_permute.group_rows."""
    experts_TK = experts_TK.contiguous()
    num_pairs, top_k = experts_TK.numel(), experts_TK.shape[1]
    source = torch.empty(num_pairs, dtype=torch.int64, device=experts_TK.device)
    counts_L = torch.empty(num_experts, dtype=torch.int64, device=experts_TK.device)
    positions_TK = torch.empty_like(experts_TK)
    num_pair_programs = triton.cdiv(num_pairs, _BLOCK)
    group_pairs_kernel[(num_pair_programs + triton.cdiv(num_experts, _BLOCK),)](
        experts_TK,
        source,
        positions_TK,
        counts_L,
        num_pairs,
        num_experts,
        num_pair_programs,
        top_k,
        BLOCK=_BLOCK,
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
