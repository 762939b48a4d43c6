"""Rows of a step over ranks: parts add up, padding comes last, groups see the same numbers."""

from hypothesis import given
from hypothesis import strategies as st

from core.parallel.plan import Plan
from core.parallel.rows import StepRows, solo_rows


@st.composite
def steps(draw: st.DrawFn) -> tuple[Plan, tuple[int, ...]]:
    dp, tp = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    plan = Plan(dp=dp, tp_attn=tp, ep=dp * tp)
    return plan, tuple(draw(st.integers(0, 9)) for _ in range(dp))


@given(steps())
def test_parts_of_a_group_add_up(step: tuple[Plan, tuple[int, ...]]) -> None:
    plan, by_dp = step
    for dp, group in enumerate(plan.groups("tp")):
        views = [StepRows(plan, rank, by_dp) for rank in group]
        assert {view.num_real for view in views} == {by_dp[dp]}
        assert sum(view.part for view in views) == views[0].num_padded
        assert 0 <= views[0].num_padded - by_dp[dp] < plan.tp_attn
        real = [view.real_part for view in views]
        assert sum(real) == by_dp[dp]
        # Padding is at the end: a part that is not full is followed by empty ones only.
        assert real == sorted(real, reverse=True)
        assert all(0 <= view.real_part <= view.part for view in views)


@given(steps())
def test_ranks_of_an_axis_agree(step: tuple[Plan, tuple[int, ...]]) -> None:
    plan, by_dp = step
    for axis in ("world", "ep", "dp", "tp"):
        for group in plan.groups(axis):
            seen = {StepRows(plan, rank, by_dp).along(axis) for rank in group}
            assert len(seen) == 1
            assert seen.pop() == tuple(StepRows(plan, rank, by_dp).part for rank in group)


def test_numbers_of_a_small_plan() -> None:
    plan = Plan(dp=2, tp_attn=2, ep=2, tp_expert=2)
    last = StepRows(plan, 3, (5, 3))
    assert (last.num_real, last.num_padded, last.part, last.real_part) == (3, 4, 2, 1)
    assert last.along("world") == (3, 3, 2, 2)
    assert last.along("ep") == (3, 2)
    assert last.along("tp") == (2, 2)
    assert solo_rows(7).along("world") == (7,)
