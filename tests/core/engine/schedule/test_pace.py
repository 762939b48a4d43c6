"""What a step costs is measured from few steps, and inverted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engine.schedule.pace import LONG_ENOUGH_S, MOST_TOKENS, Pace, measure_pace
from core.engine.step.profile_steps import step
from core.interfaces.messages import ScheduledStep, StepFacts

SPEEDS = st.floats(1e-7, 1.0)


class Machine:
    """Steps that take exactly what a pace says."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.seconds: list[float] = []
        self.sizes: list[int] = []

    def timed(self, plan: ScheduledStep) -> float:
        facts = StepFacts([sum(plan.lengths)], [1], [plan.num_logprob_rows], True)
        self.sizes.append(sum(plan.lengths))
        self.seconds.append(self.pace.step_s(plan, facts))
        return self.seconds[-1]


@given(
    token_s=SPEEDS,
    pair_share=st.floats(0, 1e-3),
    logprob_share=st.floats(0, 10),
    base_tokens=st.floats(0, 15),
    context=st.integers(1, 100_000),
    step_tokens=st.integers(1, 8192),
)
def test_it_finds_the_pace_of_a_machine(
    token_s: float,
    pair_share: float,
    logprob_share: float,
    base_tokens: float,
    context: int,
    step_tokens: int,
) -> None:
    right = Pace(
        token_s, token_s * pair_share, token_s * logprob_share, base_s=token_s * base_tokens
    )
    machine = Machine(right)
    found = measure_pace(machine.timed, step_tokens=step_tokens, context_tokens=context)
    assert found.known
    assert max(machine.sizes) <= min(step_tokens, context, MOST_TOKENS)
    num = max(machine.sizes)
    if context >= 2 * num and num >= 16:  # else there is no room to tell attention from the rest
        assert found.token_s == pytest.approx(right.token_s, rel=1e-3)
        assert found.base_s == pytest.approx(right.base_s, rel=1e-3, abs=1e-6)
        assert found.pair_s == pytest.approx(right.pair_s, rel=1e-3, abs=1e-9)
    if num > 1:
        assert found.logprob_s == pytest.approx(right.logprob_s, rel=1e-3, abs=1e-9)


def test_a_slow_machine_is_not_kept_with_large_steps() -> None:
    machine = Machine(Pace(0.1))
    measure_pace(machine.timed, step_tokens=8192, context_tokens=8192)
    assert max(machine.sizes) == 16
    machine = Machine(Pace(1e-3, 1e-7, 1e-3))
    measure_pace(machine.timed, step_tokens=8192, context_tokens=8192)
    assert sum(machine.seconds) < 10 * LONG_ENOUGH_S


@given(
    token_s=SPEEDS,
    pair_s=st.floats(0, 1e-3),
    logprob_s=st.floats(0, 1.0),
    start=st.integers(0, 200_000),
    seconds=st.floats(0, 100),
    with_logprobs=st.booleans(),
)
def test_tokens_of_a_time_take_that_time_at_most(
    token_s: float,
    pair_s: float,
    logprob_s: float,
    start: int,
    seconds: float,
    with_logprobs: bool,
) -> None:
    pace = Pace(token_s, pair_s, logprob_s)
    length = pace.prompt_tokens(start, seconds, with_logprobs)
    assert pace.prompt_s(start, length, with_logprobs) <= seconds * (1 + 1e-9)
    assert pace.prompt_s(start, length + 1, with_logprobs) > seconds * (1 - 1e-9)


def test_a_step_of_another_dp_rank_counts() -> None:
    pace = Pace(0.5, 0.0, 2.0)
    plan = step(decodes=[7], prompts=[(0, 3)])
    assert pace.step_s(plan, StepFacts([4, 10], [2, 1], [0, 3], True)) == 10 * 0.5 + 3 * 2.0
    assert Pace().step_s(plan, StepFacts([4], [2], [0], True)) == 0.0


@pytest.mark.parametrize(("base_s", "seconds"), [(0.0, 0.1), (0.02, 0.3), (5.0, 0.5)])
def test_a_step_is_as_long_as_its_fixed_cost_asks_for(base_s: float, seconds: float) -> None:
    assert Pace(0.001, base_s=base_s).worthwhile_s() == pytest.approx(seconds)


def test_a_disturbed_measurement_is_repeated() -> None:
    """Where the machine has other things to do now and then: every second step takes four times as
    long."""
    right = Pace(1e-3, 1e-6, base_s=0.02)
    machine = Machine(right)
    runs = 0

    def disturbed(plan: ScheduledStep) -> float:
        nonlocal runs
        runs += 1
        return machine.timed(plan) * (4.0 if runs % 2 else 1.0)

    found = measure_pace(disturbed, step_tokens=8192, context_tokens=8192)
    assert found.token_s == pytest.approx(right.token_s, rel=1e-3)
    assert found.pair_s == pytest.approx(right.pair_s, rel=1e-3)
    assert found.base_s == pytest.approx(right.base_s, rel=1e-3)


def test_a_step_follows_how_long_steps_take() -> None:
    """Its fixed cost too was measured wrongly, where all was."""
    pace = Pace(0.001, base_s=0.1)
    assert pace.worthwhile_s() == 0.5
    assert pace.worthwhile_s(0.1) == pytest.approx(0.15)
    assert Pace(0.001, base_s=0.01).worthwhile_s(3.0) == pytest.approx(0.45)
