"""Small routings of rows to experts, for tests of what groups rows and sums their results."""

import torch
from torch import Tensor

# Rows, experts of a row, experts of this rank.
SHAPES = [(0, 3, 4), (1, 1, 1), (7, 4, 5), (33, 8, 16), (5, 2, 40), (70, 6, 130)]


def routing(num_rows: int, top_k: int, num_experts: int) -> Tensor:
    """Distinct experts for each row, some of which are elsewhere."""
    generator = torch.Generator().manual_seed(num_rows)
    candidates = torch.rand(num_rows, max(2 * num_experts, top_k), generator=generator)
    experts_TK = candidates.argsort(1)[:, :top_k]
    return torch.where(experts_TK < num_experts, experts_TK, -1)
