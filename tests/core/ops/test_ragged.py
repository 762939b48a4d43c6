"""Ragged gather and scatter: whole rows in order, whatever rule carries them."""

import pytest
import torch

from core.interfaces.comm import Comms
from core.ops.ragged import gather_rows, padding_pays, scatter_rows
from core.parallel.plan import Plan
from core.testing.ranks import plan_comms, run_ranks

COUNTS = [(3, 3, 3, 3), (4, 1, 3, 2), (9, 0, 0, 1), (0, 0, 5, 0), (0, 0, 0, 0)]


def rows_of(rank: int, counts: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    first = sum(counts[:rank])
    return torch.arange(first, first + counts[rank]).view(-1, 1).expand(-1, 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("counts", COUNTS)
def test_gather_gives_all_rows_in_order(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    def work(comms: Comms) -> torch.Tensor:
        comm = comms.axes["world"]
        return gather_rows(comm, rows_of(comm.rank, counts, dtype), counts)

    expected = torch.arange(sum(counts)).view(-1, 1).expand(-1, 3).to(dtype)
    for found in run_ranks(plan_comms(Plan(tp_attn=4, tp_expert=4)), work):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("counts", COUNTS)
def test_scatter_gives_each_rank_its_rows_of_the_sum(counts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    partials = torch.randn(4, sum(counts), 3, generator=generator, dtype=torch.float64)

    def work(comms: Comms) -> torch.Tensor:
        comm = comms.axes["world"]
        return scatter_rows(comm, partials[comm.rank].clone(), counts)

    found = run_ranks(plan_comms(Plan(tp_attn=4, tp_expert=4)), work)
    for part, expected in zip(found, partials.sum(0).split(counts), strict=True):
        torch.testing.assert_close(part, expected)


def test_the_rule_takes_whichever_moves_less() -> None:
    assert padding_pays((4, 1, 3, 2))  # 16 padded rows against twice 10
    assert not padding_pays((9, 0, 0, 1))  # 36 against twice 10
