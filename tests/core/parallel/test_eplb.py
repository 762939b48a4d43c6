"""Balanced placements of experts: every expert has a place, ranks are even, little is moved."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import PlanError
from core.parallel.eplb import (
    TOLERANCE,
    balanced_placement,
    imbalance,
    nodes_of_groups,
    rank_loads,
)
from core.parallel.experts import LayerPlacement, default_placement


def zipf(num_experts: int, seed: int) -> list[int]:
    """Rows of experts whose popularity falls with 1 / rank, in random order."""
    loads = [1_000_000 // (rank + 1) for rank in range(num_experts)]
    random.Random(seed).shuffle(loads)
    return loads


def drifted(loads: list[int], seed: int) -> list[int]:
    generator = random.Random(seed)
    return [int(load * generator.uniform(0.8, 1.25)) for load in loads]


def num_moved(old: LayerPlacement, new: LayerPlacement) -> int:
    """Experts that a rank has to get from another one."""
    return sum(
        (Counter(new.local(rank)) - Counter(old.local(rank))).total() for rank in range(old.ep)
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ep", [8, 16, 32])
def test_skewed_loads_become_even(ep: int, seed: int) -> None:
    """The target is a busiest rank with at most 1.1 times the mean's rows."""
    loads = zipf(256, seed)
    old = default_placement(256, ep, 32)
    assert imbalance(old, loads) > 1.2
    new = balanced_placement(loads, old)
    assert imbalance(new, loads) <= 1.02
    assert new.num_physical == 288
    assert all(len(set(new.local(rank))) == new.num_local for rank in range(ep))


@pytest.mark.parametrize("ep", [8, 32])
def test_without_redundant_experts_the_best_that_can_be_had(ep: int) -> None:
    """One expert has a sixth of all rows, is on one rank, and that has to hold others too."""
    loads = zipf(256, 1)
    new = balanced_placement(loads, default_placement(256, ep, 0))
    others = sorted(loads)[: 256 // ep - 1]
    assert max(rank_loads(new, loads)) <= 1.01 * (max(loads) + sum(others))


@pytest.mark.parametrize("ep", [8, 16, 32])
def test_a_little_drift_moves_few_experts(ep: int) -> None:
    loads = zipf(256, 0)
    old = balanced_placement(loads, default_placement(256, ep, 32))
    later = drifted(loads, 1)
    new = balanced_placement(later, old)
    assert imbalance(new, later) <= 1.05
    fresh = balanced_placement(later, default_placement(256, ep, 32))
    assert num_moved(old, new) < 0.5 * num_moved(old, fresh)


def test_experts_that_stay_keep_their_slots() -> None:
    loads = zipf(64, 3)
    old = balanced_placement(loads, default_placement(64, 8, 16))
    new = balanced_placement(drifted(loads, 2), old)
    assert new != old
    for rank in range(8):
        before, after = old.local(rank), new.local(rank)
        for slot, expert in enumerate(before):
            assert expert not in after or after[slot] == expert


def test_what_is_even_already_stays() -> None:
    even = [7] * 64
    placement = default_placement(64, 8, 0)
    assert balanced_placement(even, placement) is placement
    skewed = balanced_placement(zipf(64, 0), default_placement(64, 8, 16))
    assert balanced_placement(zipf(64, 0), skewed) is skewed
    assert balanced_placement([0] * 64, skewed) is skewed


CASES = st.integers(1, 40).flatmap(
    lambda num_experts: st.tuples(
        st.lists(st.integers(0, 1000), min_size=num_experts, max_size=num_experts),
        st.integers(1, 8),
        st.integers(0, 24),
        st.randoms(use_true_random=False),
    )
)


@settings(max_examples=300, deadline=None)
@given(CASES)
def test_every_expert_has_a_place_and_none_two_on_a_rank(
    case: tuple[list[int], int, int, random.Random],
) -> None:
    loads, ep, extra, generator = case
    num_experts = len(loads)
    num_physical = -(-(num_experts + extra) // ep) * ep
    places = [*range(num_experts)]
    places += generator.choices(range(num_experts), k=num_physical - num_experts)
    generator.shuffle(places)
    old = LayerPlacement(num_experts, ep, tuple(places))
    new = balanced_placement(loads, old)  # LayerPlacement checks that every expert has a place
    assert (new.num_logical, new.ep, new.num_physical) == (num_experts, ep, num_physical)
    assert imbalance(new, loads) <= imbalance(old, loads) + 1e-9
    if new is not old and new.num_local <= num_experts:
        assert all(len(set(new.local(rank))) == new.num_local for rank in range(ep))
    assert sum(rank_loads(new, loads)) == pytest.approx(sum(loads))
    assert balanced_placement(loads, old) == new  # every rank finds the same
    again = balanced_placement(loads, new)
    assert imbalance(again, loads) <= imbalance(new, loads) + 1e-9


@settings(max_examples=100, deadline=None)
@given(
    loads=st.lists(st.integers(0, 1000), min_size=64, max_size=64),
    nodes=st.sampled_from([2, 4, 8]),
    redundant=st.sampled_from([0, 8, 16]),
)
def test_hierarchical_keeps_groups_on_nodes(loads: list[int], nodes: int, redundant: int) -> None:
    old = default_placement(64, 8, redundant)
    new = balanced_placement(loads, old, num_groups=8, num_nodes=nodes)
    per_node = 8 // nodes
    seen: Counter[int] = Counter()
    for node in range(nodes):
        held = {e for rank in range(per_node) for e in new.local(node * per_node + rank)}
        groups = {expert // 8 for expert in held}
        assert len(groups) == 8 // nodes
        seen.update(groups)
    assert seen == Counter(range(8))
    later = balanced_placement(drifted(loads, 0), new, num_groups=8, num_nodes=nodes)
    assert imbalance(later, drifted(loads, 0)) <= imbalance(new, drifted(loads, 0)) + 1e-9


@pytest.mark.parametrize("nodes", [2, 4])
def test_hierarchical_is_as_even_as_its_nodes(nodes: int) -> None:
    """256 experts in 8 groups, 32 redundant, 32 ranks: inside a node ranks are even."""
    loads = zipf(256, 4)
    new = balanced_placement(loads, default_placement(256, 32, 32), num_groups=8, num_nodes=nodes)
    busy = rank_loads(new, loads)
    per_node = 32 // nodes
    for node in range(nodes):
        mine = busy[node * per_node : (node + 1) * per_node]
        assert max(mine) <= 1.05 * sum(mine) / per_node


def test_nodes_are_used_where_groups_divide() -> None:
    sizes = {"num_experts": 256, "num_groups": 8, "ep": 16}
    assert nodes_of_groups("auto", nodes=2, **sizes) == 2
    assert nodes_of_groups("hierarchical", nodes=4, **sizes) == 4
    assert nodes_of_groups("global", nodes=2, **sizes) == 1
    assert nodes_of_groups("auto", nodes=3, **sizes) == 1
    assert nodes_of_groups("auto", num_experts=128, num_groups=1, ep=16, nodes=2) == 1
    with pytest.raises(PlanError, match=r"strategy='hierarchical': 8 groups .* launch\.nnodes=3"):
        nodes_of_groups("hierarchical", nodes=3, **sizes)


def test_imbalance_is_that_of_a_hand_made_case() -> None:
    placement = LayerPlacement(3, 2, (0, 1, 0, 2))
    assert rank_loads(placement, [10, 4, 1]) == [9.0, 6.0]
    assert imbalance(placement, [10, 4, 1]) == pytest.approx(9 / 7.5)
    assert imbalance(placement, [0, 0, 0]) == 1.0
    assert 0 < TOLERANCE < 0.1
