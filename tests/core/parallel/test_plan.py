"""Plans: ranks, coordinates and groups of both views."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import PlanError
from core.parallel.plan import AXES, Plan

SIZE = st.sampled_from([1, 2, 3, 4, 6])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans whose two views cut a stage differently: dp x tp = (a b) x (c d) = ep x tp_expert."""
    a, b, c, d = draw(SIZE), draw(SIZE), draw(SIZE), draw(st.sampled_from([1, 2]))
    return Plan(pp=draw(SIZE), dp=a * b, tp_attn=c * d, ep=a * c, tp_expert=b * d)


@given(plans())
def test_every_rank_is_in_exactly_one_group_of_each_axis(plan: Plan) -> None:
    for axis in AXES:
        groups = plan.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(plan.world_size))
        assert all(len(group) == plan.axis_size(axis) for group in groups)
        for group in groups:
            assert [plan.axis_index(axis, rank) for rank in group] == list(range(len(group)))
            assert all(plan.group(axis, rank) == group for rank in group)


@given(plans())
def test_both_views_name_every_rank_once_and_agree_on_the_stage(plan: Plan) -> None:
    dense, sparse = set(), set()
    for rank in range(plan.world_size):
        at = plan.coordinates(rank)
        dense.add((at["pp"], at["dp"], at["tp"]))
        sparse.add((at["pp"], at["ep"], at["tp_expert"]))
        # The rank's number, written out from either view.
        assert rank == (at["pp"] * plan.dp + at["dp"]) * plan.tp_attn + at["tp"]
        assert rank == (at["pp"] * plan.ep + at["ep"]) * plan.tp_expert + at["tp_expert"]
    assert len(dense) == len(sparse) == plan.world_size


@given(plans())
def test_members_of_a_group_differ_only_along_its_axis(plan: Plan) -> None:
    for view in (("pp", "dp", "tp"), ("pp", "ep", "tp_expert")):
        for axis in view:
            for group in plan.groups(axis):
                for other in set(view) - {axis}:
                    assert len({plan.axis_index(other, rank) for rank in group}) == 1


def test_groups_of_a_small_plan() -> None:
    plan = Plan(dp=2, tp_attn=2, ep=4, tp_expert=1)
    assert plan.groups("tp") == [[0, 1], [2, 3]]
    assert plan.groups("dp") == [[0, 2], [1, 3]]
    assert plan.groups("ep") == [[0, 1, 2, 3]]
    assert plan.groups("pp") == [[0], [1], [2], [3]]


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        Plan(pp=0, dp=2, tp_attn=2, ep=3, redundant_experts=-1)
    assert len(caught.value.problems) == 3
    text = str(caught.value)
    assert "pp=0" in text
    assert "2 x 2 = 4" in text
    assert "3 x 1 = 3" in text
    assert "redundant_experts=-1" in text


def test_an_unknown_axis_and_a_rank_outside_are_refused() -> None:
    plan = Plan(tp_attn=2, tp_expert=2)
    with pytest.raises(KeyError):
        plan.axis_size("x")
    with pytest.raises(AssertionError):
        plan.axis_index("tp", 2)
