"""Logical experts -> physical ones, padding left out and rows counted: one kernel on a GPU.

Never waits for the device, so that it may be recorded in a CUDA graph. Knows nothing of placements.
Shape legend: T rows, K experts of a row, X logical experts, C most copies of one expert.
"""

# Kernels are written in Triton's language, which has no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 256


class Copies(NamedTuple):
    """Where the copies of every expert stand, on the device; written in place when they move."""

    physical_XC: Tensor  # int64; -1 past an expert's copies
    num_copies_X: Tensor  # int64


def map_experts(
    logical_TK: Tensor,
    weights_TK: Tensor,
    copies: Copies,
    counts_X: Tensor,
    num_real: Tensor,
    first_row: int,
    first_copy: int,
) -> Tensor:
    """Physical ids (T, K) int64; -1, and a weight of 0, in rows that are padding.

    Row t is padding where first_row + t >= `num_real` (int32, (1,)). Of an expert's copies row t
    takes number first_copy + t, in turn. Adds the real rows of each expert to `counts_X` (int64)
    and overwrites `weights_TK`.
    """
    if logical_TK.device.type == "cuda":
        return _launch(logical_TK, weights_TK, copies, counts_X, num_real, first_row, first_copy)
    num_rows, most_copies = logical_TK.shape[0], copies.physical_XC.shape[1]
    rows_T1 = torch.arange(num_rows, device=logical_TK.device).unsqueeze(1)
    real_TK = (rows_T1 + first_row < num_real).expand_as(logical_TK)
    counts_X.scatter_add_(0, logical_TK.flatten(), real_TK.flatten().long())
    weights_TK.masked_fill_(~real_TK, 0)
    copy_TK = (rows_T1 + first_copy) % copies.num_copies_X[logical_TK]
    physical_TK = copies.physical_XC.view(-1)[logical_TK * most_copies + copy_TK]
    return physical_TK.masked_fill_(~real_TK, -1)


def _launch(
    logical_TK: Tensor,
    weights_TK: Tensor,
    copies: Copies,
    counts_X: Tensor,
    num_real: Tensor,
    first_row: int,
    first_copy: int,
) -> Tensor:
    from core.kernels.dependent_launch import options
    from core.kernels.triton_expert_map import map_experts_kernel

    assert logical_TK.is_contiguous()
    assert weights_TK.is_contiguous()
    physical_TK = torch.empty_like(logical_TK)
    num_pairs = logical_TK.numel()
    if num_pairs:
        map_experts_kernel[(-(-num_pairs // _BLOCK),)](
            logical_TK,
            weights_TK,
            copies.physical_XC,
            copies.num_copies_X,
            counts_X,
            num_real,
            physical_TK,
            num_pairs,
            first_row,
            first_copy,
            TOP_K=logical_TK.shape[1],
            MOST_COPIES=copies.physical_XC.shape[1],
            BLOCK=_BLOCK,
            num_warps=4,
            **options(logical_TK.device),
        )
    return physical_TK
