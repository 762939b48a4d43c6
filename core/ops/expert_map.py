"""Logical experts -> physical ones, padding left out and rows counted, in plain torch.

Knows nothing of placements. Shape legend: T rows, K experts of a row, X logical experts, C most
copies of one expert.
"""

import torch
from torch import Tensor

from core.interfaces.destinations import Destinations


def map_experts(logical_TK: Tensor, weights_TK: Tensor, to: Destinations) -> Tensor:
    """Physical ids (T, K) int64; -1, and a weight of 0, in rows that are padding.

    Adds the real rows of each expert to `to.counts_X` and overwrites `weights_TK`.
    """
    num_rows, most_copies = logical_TK.shape[0], to.copies.physical_XC.shape[1]
    rows_T1 = torch.arange(num_rows, device=logical_TK.device).unsqueeze(1)
    real_TK = (rows_T1 + to.first_row < to.num_real).expand_as(logical_TK)
    to.counts_X.scatter_add_(0, logical_TK.flatten(), real_TK.flatten().long())
    weights_TK.masked_fill_(~real_TK, 0)
    copy_TK = (rows_T1 + to.first_copy) % to.copies.num_copies_X[logical_TK]
    physical_TK = to.copies.physical_XC.view(-1)[logical_TK * most_copies + copy_TK]
    return physical_TK.masked_fill_(~real_TK, -1)
