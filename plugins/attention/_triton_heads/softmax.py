"""The running softmax that every Triton attention kernel is built on.

Scores are in units of log2, because exp2 is what the hardware has. Shape legend: M rows of a tile,
N tokens of a tile, D dimensions of a value.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def grow_softmax(scores_MN, most_M, sum_M, acc_MD):
    """Take a tile of scores in: (weights of the tile's values, largest score, sum of weights,
    weighted values so far). Every row must have seen one token by now."""
    new_most_M = tl.maximum(most_M, tl.max(scores_MN, axis=1))
    shrink_M = tl.exp2(most_M - new_most_M)
    weights_MN = tl.exp2(scores_MN - new_most_M[:, None])
    sum_M = sum_M * shrink_M + tl.sum(weights_MN, axis=1)
    return weights_MN, new_most_M, sum_M, acc_MD * shrink_M[:, None]
