"""When a step ends, foreseen; on a clock that the tests turn."""

import pytest

from core.engine.foresight import GROWING, SHRINKING, TRUSTED_SHARE, Blind, LastSteps
from core.engine.trial_steps import step

WAITED_S = 0.01


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def decodes(count: int) -> object:
    return step(decodes=[8] * count)


def mixed(count: int, tokens: int) -> object:
    return step(decodes=[8] * count, prompts=[(0, tokens)])


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def foresight(clock: Clock) -> LastSteps:
    return LastSteps(0.003, clock=clock, sleep=clock.sleep)


def test_nothing_is_foreseen_of_what_was_never_seen(foresight: LastSteps, clock: Clock) -> None:
    assert foresight.expected_s(decodes(4)) == 0
    foresight.observe(decodes(4), 0.008, WAITED_S)
    assert foresight.expected_s(mixed(4, 512)) == 0
    foresight.wait(clock.now, 0.0)
    assert clock.now == 100.0


def test_a_step_takes_what_the_last_ones_took(foresight: LastSteps) -> None:
    foresight.observe(decodes(4), 0.008, WAITED_S)
    assert foresight.expected_s(decodes(4)) == pytest.approx(0.008)
    assert foresight.expected_s(decodes(9)) == pytest.approx(0.008)  # never more than was seen
    assert foresight.expected_s(decodes(1)) == pytest.approx(0.002)
    foresight.observe(mixed(4, 1000), 0.028, WAITED_S)
    assert foresight.expected_s(mixed(4, 500)) == pytest.approx(0.018)


def test_less_counts_at_once_and_more_by_and_by(foresight: LastSteps) -> None:
    foresight.observe(decodes(4), 0.008, WAITED_S)
    foresight.observe(decodes(4), 0.900, WAITED_S)
    assert foresight.expected_s(decodes(4)) == pytest.approx(0.008 * GROWING)
    foresight.observe(decodes(4), 0.009, WAITED_S)
    assert foresight.expected_s(decodes(4)) == pytest.approx(0.009)
    foresight.observe(decodes(4), 0.006, WAITED_S)
    assert foresight.expected_s(decodes(4)) == pytest.approx(0.006)


def test_one_slow_step_does_not_have_the_next_one_planned_too_late(
    foresight: LastSteps, clock: Clock
) -> None:
    for seconds in (0.020, 0.020, 0.500):
        foresight.observe(decodes(4), seconds, WAITED_S)
    begun_s = clock.now
    foresight.wait(begun_s, foresight.expected_s(decodes(4)))
    assert begun_s < clock.now < begun_s + 0.020


def test_a_step_that_had_ended_before_anybody_looked_was_foreseen_too_long(
    foresight: LastSteps,
) -> None:
    foresight.observe(decodes(4), 0.008, WAITED_S)
    for expected in (0.008 * SHRINKING, 0.008 * SHRINKING**2):
        foresight.observe(decodes(4), 0.030, 0.0)
        assert foresight.expected_s(decodes(4)) == pytest.approx(expected)


def test_few_prompt_tokens_say_nothing_of_what_one_costs(foresight: LastSteps) -> None:
    foresight.observe(decodes(4), 0.008, WAITED_S)
    foresight.observe(mixed(4, 16), 0.020, WAITED_S)
    assert foresight.expected_s(mixed(4, 512)) == 0


def test_waiting_ends_a_margin_before_the_step_does(foresight: LastSteps, clock: Clock) -> None:
    foresight.wait(99.99, 0.030)
    assert clock.now == pytest.approx(99.99 + TRUSTED_SHARE * 0.030 - 0.003)
    foresight.wait(99.0, 0.030)  # that time is over
    assert clock.now == pytest.approx(99.99 + TRUSTED_SHARE * 0.030 - 0.003)
    foresight.wait(clock.now, 60.0)  # a step that hangs is for others to find
    assert clock.now < 101


def test_the_blind_never_wait() -> None:
    blind = Blind()
    blind.observe(decodes(4), 0.008, WAITED_S)
    assert blind.expected_s(decodes(4)) == 0
