"""Logical to physical experts: the kernel against plain Python, interpreted or on the GPU."""

import random

import pytest
import torch

from core.kernels import expert_map
from core.kernels.expert_map import Copies, map_experts

CUDA = torch.cuda.is_available()


@pytest.mark.parametrize("kernel", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("seed", range(6))
def test_pairs_are_mapped_padding_left_out_and_rows_counted(kernel: bool, seed: int) -> None:
    device = torch.device("cuda" if kernel and CUDA else "cpu")
    source = random.Random(seed)
    num_experts, most = source.choice((4, 13, 256)), source.choice((1, 3))
    num_rows, top_k = source.choice((0, 1, 40, 300)), source.choice((1, 3))
    first_row, first_copy = source.choice((0, 5)), source.choice((0, 2))
    num_real = first_row + source.randint(0, num_rows + 2)
    copies = [
        [source.randrange(1000) for _ in range(source.randint(1, most))] for _ in range(num_experts)
    ]
    logical = [source.sample(range(num_experts), top_k) for _ in range(num_rows)]
    tables = Copies(
        torch.tensor([[*c, *[-1] * (most - len(c))] for c in copies], device=device),
        torch.tensor([len(c) for c in copies], device=device),
    )
    counts_X = torch.full((num_experts,), 7, device=device)
    logical_TK = torch.tensor(logical, dtype=torch.int64, device=device).view(num_rows, top_k)
    weights_TK = torch.full((num_rows, top_k), 0.5, device=device)
    run = expert_map._launch if kernel else map_experts
    physical_TK = run(
        logical_TK,
        weights_TK,
        tables,
        counts_X,
        torch.tensor([num_real], dtype=torch.int32, device=device),
        first_row,
        first_copy,
    )
    expected, counts = [], [7] * num_experts
    for row, experts in enumerate(logical):
        if first_row + row >= num_real:
            expected.append([-1] * top_k)
            continue
        expected.append([copies[x][(row + first_copy) % len(copies[x])] for x in experts])
        for x in experts:
            counts[x] += 1
    assert physical_TK.tolist() == expected
    assert counts_X.tolist() == counts
    assert weights_TK.tolist() == [[0.0 if p < 0 else 0.5 for p in row] for row in expected]
