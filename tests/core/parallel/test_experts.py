"""Places of experts: every one has one, ranks hold equally many, errors say what would do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import PlanError
from core.parallel.experts import LayerPlacement, default_placement, expert_problems


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 40))
def test_the_default_places_every_expert(num_experts: int, ep: int, redundant: int) -> None:
    if (num_experts + redundant) % ep != 0:
        with pytest.raises(PlanError):
            default_placement(num_experts, ep, redundant)
        return
    placement = default_placement(num_experts, ep, redundant)
    assert placement.num_physical == num_experts + redundant
    held = [logical for index in range(ep) for logical in placement.local(index)]
    assert tuple(held) == placement.logical_of
    counts = [len(placement.copies(logical)) for logical in range(num_experts)]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    for logical in range(num_experts):
        assert all(placement.logical_of[p] == logical for p in placement.copies(logical))


def test_what_does_not_divide_is_answered_with_what_does() -> None:
    (text,) = expert_problems(256, 16, 5)
    assert "parallel.redundant_experts=5" in text
    assert "0 or 16" in text
    for allowed in (0, 16):
        assert expert_problems(256, 16, allowed) == []
    (text,) = expert_problems(10, 4, 0)
    assert text.endswith("allowed next to it: 2")


def test_a_lost_expert_is_refused() -> None:
    with pytest.raises(AssertionError, match="no place"):
        LayerPlacement(3, 1, (0, 1, 1))
