"""The weighted sum of experts' results in a Triton kernel.

For GPUs; on CPU tensors it runs in Triton's interpreter (TRITON_INTERPRET=1), for tests. The
oracle is core.ops.moe_permute. Shape legend: see there.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from core.gpu_tools.dependent_launch import let_successor_start, options, wait_for_predecessor

_MOST_COLUMNS = 256  # of one program, 16 bytes of each thread: a long row is spread over several


@triton.jit
def sum_results_kernel(
    results_ptr,
    positions_ptr,
    weights_ptr,
    out_ptr,
    hidden_size,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    IN_ORDER: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Part of one row: its results, all read at once where they lie, added up in float32."""
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns_E = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    choices_K = tl.arange(0, BLOCK_K)
    inside_K = choices_K < TOP_K
    positions_K = tl.load(positions_ptr + row * TOP_K + choices_K, mask=inside_K, other=-1)
    if IN_ORDER:
        positions_K = tl.where(positions_K >= 0, row * TOP_K + choices_K, -1)
    if WEIGHTED:
        weights_K = tl.load(weights_ptr + row * TOP_K + choices_K, mask=inside_K, other=0.0)
    # What no position names may be NaN, so that it must not even be multiplied by 0.
    inside_KE = (positions_K >= 0)[:, None] & (columns_E < hidden_size)[None, :]
    places_KE = positions_K.to(tl.int64)[:, None] * hidden_size + columns_E[None, :]
    results_KE = tl.load(results_ptr + places_KE, mask=inside_KE, other=0.0).to(tl.float32)
    if WEIGHTED:
        results_KE *= weights_K[:, None]
    out_E = tl.sum(results_KE, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * hidden_size + columns_E, out_E, mask=columns_E < hidden_size)


def sum_results(
    results_ME: Tensor,
    positions_TK: Tensor,
    weights_TK: Tensor | None,
    out_TE: Tensor,
    *,
    in_order: bool = False,
) -> Tensor:
    """Fill `out_TE`; see core.ops.moe_permute.sum_results. `in_order`: the results are those of
    all pairs, (T * K, E), and of positions only matters which are none."""
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
            TOP_K=positions_TK.shape[1],
            WEIGHTED=weights_TK is not None,
            IN_ORDER=in_order,
            BLOCK_K=triton.next_power_of_2(positions_TK.shape[1]),
            BLOCK_E=block,
            num_warps=1,
            **options(out_TE.device),
        )
    return out_TE
