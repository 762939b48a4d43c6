"""The weighted sum of experts' results in a Triton kernel.

For GPUs; on CPU tensors it runs in Triton's interpreter (TRITON_INTERPRET=1), for tests. The
oracle is core.kernels.moe_permute. Shape legend: see there.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from core.kernels.dependent_launch import let_successor_start, options, wait_for_predecessor

_MOST_COLUMNS = 1024  # of one program: a long row is spread over several


@triton.jit
def sum_results_kernel(
    results_ptr,
    positions_ptr,
    weights_ptr,
    out_ptr,
    hidden_size,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Part of one row: its results, read where they lie, added up in float32."""
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns_E = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total_E = tl.zeros((BLOCK_E,), tl.float32)
    for k in tl.static_range(TOP_K):
        position = tl.load(positions_ptr + row * TOP_K + k)
        # What no position names may be NaN, so that it must not even be multiplied by 0.
        width = tl.where(position >= 0, hidden_size, 0)
        place_ptr = results_ptr + position.to(tl.int64) * hidden_size
        result_E = tl.load(place_ptr + columns_E, mask=columns_E < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            result_E *= tl.load(weights_ptr + row * TOP_K + k)
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
            TOP_K=positions_TK.shape[1],
            WEIGHTED=weights_TK is not None,
            BLOCK_E=block,
            **options(out_TE.device),
        )
    return out_TE
