"""Logical to physical experts: what every set of operations makes of a routing, against plain
Python. Triton's kernel runs in its interpreter where there is no GPU."""

import random
from collections.abc import Callable

import pytest
import torch

from core.devices.cpu.cpu_ops import CpuOps
from core.devices.cuda.triton_ops import TritonOps
from core.interfaces.destinations import Copies, Destinations
from core.interfaces.ops import Ops
from core.interfaces.routing import Routing
from core.ops.torch_ops import TorchOps

GPU = "cuda" if torch.cuda.is_available() else "cpu"
SETS = {"torch": (TorchOps, "cpu"), "cpu": (CpuOps, "cpu"), "triton": (TritonOps, GPU)}


@pytest.mark.parametrize(("make", "device"), SETS.values(), ids=SETS)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_rows_are_mapped_padding_left_out_and_counted(
    make: Callable[[], Ops], device: str, seed: int, normalise: bool
) -> None:
    source = random.Random(seed)
    num_experts, most = source.choice((4, 13, 256)), source.choice((1, 3))
    num_rows, top_k = source.choice((0, 1, 40, 300)), source.choice((1, 3))
    first_row, first_copy = source.choice((0, 5)), source.choice((0, 2))
    num_real = first_row + source.randint(0, num_rows + 2)
    copies = [
        [source.randrange(1000) for _ in range(source.randint(1, most))] for _ in range(num_experts)
    ]
    to = Destinations(
        Copies(
            torch.tensor([[*c, *[-1] * (most - len(c))] for c in copies], device=device),
            torch.tensor([len(c) for c in copies], device=device),
        ),
        torch.full((num_experts,), 7, device=device),
        torch.tensor([num_real], dtype=torch.int32, device=device),
        first_row,
        first_copy,
    )
    logical = [source.sample(range(num_experts), top_k) for _ in range(num_rows)]
    logits_TX = torch.full((num_rows, num_experts), -50.0)
    for logits_X, experts in zip(logits_TX, logical, strict=True):
        logits_X[experts] = torch.arange(top_k, 0, -1).float()
    routing = Routing(top_k=top_k, scoring="sigmoid", normalise=normalise, scale=2.0)
    weights_TK, physical_TK = make().route(logits_TX.to(device), None, routing, to)
    expected, counts = [], [7] * num_experts
    for row, experts in enumerate(logical):
        if first_row + row >= num_real:
            expected.append([-1] * top_k)
            continue
        expected.append([copies[x][(row + first_copy) % len(copies[x])] for x in experts])
        for x in experts:
            counts[x] += 1
    assert physical_TK.tolist() == expected
    assert to.counts_X.tolist() == counts
    scores_K = torch.arange(top_k, 0, -1).double().sigmoid()
    weights_K = 2.0 * (scores_K / scores_K.sum() if normalise else scores_K)
    for weights, experts in zip(weights_TK.cpu().double(), expected, strict=True):
        right_K = weights_K if experts[0] >= 0 else torch.zeros(top_k)
        torch.testing.assert_close(weights, right_K.double(), atol=1e-6, rtol=1e-6)
