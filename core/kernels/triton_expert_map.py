"""The Triton kernel of core.kernels.expert_map."""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from core.kernels.dependent_launch import let_successor_start, wait_for_predecessor


@triton.jit(do_not_specialize=["num_pairs", "first_row", "first_copy"])
def map_experts_kernel(
    logical_ptr,
    weights_ptr,
    physical_ptr,
    num_copies_ptr,
    counts_ptr,
    num_real_ptr,
    out_ptr,
    num_pairs,
    first_row,
    first_copy,
    TOP_K: tl.constexpr,
    MOST_COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """BLOCK pairs of a row and one of its experts."""
    wait_for_predecessor(DEPENDENT)
    let_successor_start(DEPENDENT)
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pairs < num_pairs
    rows = pairs // TOP_K
    real = inside & (rows + first_row < tl.load(num_real_ptr))
    logical = tl.load(logical_ptr + pairs, mask=inside, other=0)
    copies = tl.load(num_copies_ptr + logical, mask=inside, other=1)
    turn = (rows + first_copy) % copies
    physical = tl.load(physical_ptr + logical * MOST_COPIES + turn, mask=inside, other=0)
    tl.store(out_ptr + pairs, tl.where(real, physical, -1), mask=inside)
    tl.store(weights_ptr + pairs, 0.0, mask=inside & ~real)
    tl.atomic_add(counts_ptr + logical, 1, mask=real, sem="relaxed")
