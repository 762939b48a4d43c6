"""Grouping rows by expert, against loops over pairs. Kernels: tests/contracts."""

import pytest
import torch
from torch import Tensor

from core.interfaces.moe_a2a import Grouping
from core.ops.moe_permute import count_values, group_rows, pad_groups, sum_results
from tests.support.routing import SHAPES, routing


def pairs_of(experts_TK: Tensor, expert: int) -> list[int]:
    return [row for row, chosen in enumerate(experts_TK.tolist()) if expert in chosen]


@pytest.mark.parametrize(("num_rows", "top_k", "num_experts"), SHAPES)
def test_pairs_lie_by_expert_and_in_the_order_of_rows(
    num_rows: int, top_k: int, num_experts: int
) -> None:
    experts_TK = routing(num_rows, top_k, num_experts)
    grouping = group_rows(experts_TK, num_experts)
    expected = [pairs_of(experts_TK, expert) for expert in range(num_experts)]
    assert grouping.counts_L.tolist() == [len(rows) for rows in expected]
    assert grouping.source.tolist() == [row for rows in expected for row in rows]
    check_positions(grouping, experts_TK)


@pytest.mark.parametrize(("num_rows", "top_k", "num_experts"), SHAPES)
def test_padded_groups_begin_with_their_pairs(num_rows: int, top_k: int, num_experts: int) -> None:
    experts_TK = routing(num_rows, top_k, num_experts)
    grouping = pad_groups(group_rows(experts_TK, num_experts), experts_TK, capacity=num_rows)
    assert grouping.source.shape[0] == num_experts
    for expert in range(num_experts):
        rows = pairs_of(experts_TK, expert)
        assert int(grouping.counts_L[expert]) == len(rows)
        assert grouping.source[expert, : len(rows)].tolist() == rows
    check_positions(grouping, experts_TK)


def check_positions(grouping: Grouping, experts_TK: Tensor) -> None:
    """A pair stands where its row is read; no two stand in one place."""
    source, positions_TK = grouping.source.flatten(), grouping.positions_TK
    places = positions_TK[positions_TK >= 0]
    assert len(set(places.tolist())) == len(places) == int(grouping.counts_L.sum())
    assert torch.equal(positions_TK < 0, experts_TK < 0)
    for row, of_row in enumerate(positions_TK.tolist()):
        assert all(int(source[place]) == row for place in of_row if place >= 0)


def test_where_the_host_does_not_count_more_rows_follow() -> None:
    """As on a GPU: the number of pairs is an upper bound, and what follows can be read."""
    experts_TK = routing(9, 4, 6)
    exact, bound = group_rows(experts_TK, 6), group_rows(experts_TK, 6, num_pairs=36)
    num_pairs = len(exact.source)
    assert num_pairs < 36 == len(bound.source)
    assert torch.equal(bound.source[:num_pairs], exact.source)
    assert torch.equal(bound.positions_TK, exact.positions_TK)
    assert 0 <= int(bound.source.min()) <= int(bound.source.max()) < 9


def test_no_results_at_all_are_zeros() -> None:
    nothing = sum_results(torch.empty(0, 5), torch.full((3, 2), -1), torch.ones(3, 2))
    assert torch.equal(nothing, torch.zeros(3, 5))


def test_values_are_counted() -> None:
    values = torch.tensor([[3, 0], [3, 3]])
    assert count_values(values, 5).tolist() == [1, 0, 0, 3, 0]
