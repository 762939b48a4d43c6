"""How many prompt tokens fit beside decodes, by a speed; and how the scheduler spreads prompts."""

import random
from collections.abc import Sequence

import pytest

from core.engine.run.lockstep import rank_facts, settle
from core.engine.schedule.mixed_steps import LEAST_TOKENS, STEP_S, mixed_tokens
from core.engine.schedule.scheduler import Scheduler
from core.engine.schedule.step_size import BACKLOG_STEPS
from core.interfaces.messages import Abort, Generate, SamplingParams, ScheduledStep, StepResult
from core.settings.config import EngineConfig


@pytest.mark.parametrize(
    ("token_s", "expected"),
    [
        (STEP_S / 1024, 1024),
        (STEP_S / 1100, 1024),
        (STEP_S / 1200, 1280),
        (STEP_S / 10, LEAST_TOKENS),
        (STEP_S / 100_000, 8192),
    ],
)
def test_the_bound_is_what_takes_so_long(token_s: float, expected: int) -> None:
    runs = iter([3.0, 1.0, 1.2])  # the first run of a shape is slow

    def timed(plan: ScheduledStep) -> float:
        return next(runs) * token_s * sum(plan.lengths)

    assert mixed_tokens(timed, 4095, 8192) == expected


def scheduler(mixed: int | None, dp_rank: int = 0) -> Scheduler:
    config = EngineConfig(page_size=16, max_prefill_tokens=8192, chunked_prefill_size=8192)
    return Scheduler(
        config,
        num_pages=4000,
        max_model_len=20000,
        eos_ids=[],
        dp_rank=dp_rank,
        mixed_tokens=mixed,
    )


def prompt_tokens(scheduler: Scheduler, prompts: list[int], num_steps: int) -> list[int]:
    """Of steps after prompts came while another request decodes."""
    sampling = SamplingParams(max_tokens=200, ignore_eos=True)
    found = []

    def turn() -> int:
        plan = scheduler.next_batch()
        assert plan is not None
        scheduler.commit(plan, StepResult([7] * sum(plan.samples), {}, {}))
        return sum(plan.lengths[plan.num_decodes :])

    scheduler.admit([Generate("decodes", [1] * 8, sampling)])
    turn()
    messages = [Generate(f"{n}", [n + 2] * size, sampling) for n, size in enumerate(prompts)]
    scheduler.admit(messages)
    for _ in range(num_steps):
        found.append(turn())
    return found


@pytest.mark.parametrize(
    ("mixed", "prompts", "expected"),
    [
        (1024, [300], [300, 0]),
        (1024, [1024, 1024], [1024, 1024, 0]),
        (1024, [1152], [1152, 0]),  # no second step for what is left
        (1024, [700, 700, 700], [1050, 1050, 0]),
        (None, [1024, 1024], [2048, 0]),
        (1024, [2048] * BACKLOG_STEPS, [2048] * BACKLOG_STEPS + [0]),
        (512, [8000] * BACKLOG_STEPS, [8000] * BACKLOG_STEPS + [0]),
        (512, [8000] * 10, [8192, 8192]),
    ],
)
def test_prompts_are_spread_over_steps_with_decodes(
    mixed: int | None, prompts: list[int], expected: list[int]
) -> None:
    made = scheduler(mixed)
    assert prompt_tokens(made, prompts, len(expected)) == expected


def test_a_burst_ends_when_no_prompt_waits() -> None:
    """Its large steps are not those of the prompts that come after it."""
    made = scheduler(512)
    assert prompt_tokens(made, [2000] * BACKLOG_STEPS, BACKLOG_STEPS + 1)[-1] == 0
    sampling = SamplingParams(max_tokens=200, ignore_eos=True)
    made.admit([Generate("later", [9] * 1024, sampling)])
    plan = made.next_batch()
    assert plan is not None
    assert sum(plan.lengths[plan.num_decodes :]) == 512


def test_a_step_without_decodes_takes_what_there_is() -> None:
    made = scheduler(512)
    sampling = SamplingParams(max_tokens=4)
    made.admit([Generate(f"{n}", [n + 2] * 2000, sampling) for n in range(5)])
    plan = made.next_batch()
    assert plan is not None
    assert sum(plan.lengths) == 8192


class Ranks:
    """The schedulers of several DP ranks, one step after the other."""

    def __init__(self, num_dp: int, mixed: int | None) -> None:
        self.schedulers = [scheduler(mixed, dp_rank) for dp_rank in range(num_dp)]
        self._follow: Sequence[bool] = []

    def turn(self) -> list[ScheduledStep | None]:
        plans = [each.next_batch(self._follow) for each in self.schedulers]
        told = [rank_facts(1, plan, busy=True) for plan in plans]
        self._follow = settle(told).decodes_follow
        for each, plan in zip(self.schedulers, plans, strict=True):
            if plan is not None:
                each.commit(plan, StepResult([7] * sum(plan.samples), {}, {}))
                each.check()
        return plans


def prompt_tokens_of(plan: ScheduledStep | None) -> int:
    return 0 if plan is None else sum(plan.lengths[plan.num_decodes :])


ONE = SamplingParams(max_tokens=1, ignore_eos=True)  # its request never decodes


@pytest.mark.parametrize("num_dp", [2, 4])
@pytest.mark.parametrize("last", [False, True], ids=["first_rank", "last_rank"])
def test_prompts_of_a_rank_are_spread_where_another_decodes(num_dp: int, last: bool) -> None:
    """As where it decodes itself, from the very step in which the other begins to."""
    ranks = Ranks(num_dp, 1024)
    busy, other = (num_dp - 1, 0) if last else (0, num_dp - 1)
    schedulers = ranks.schedulers
    schedulers[busy].admit([Generate("long", [1] * 16384, ONE)])
    assert [prompt_tokens_of(plan) for plan in ranks.turn()][busy] == 8192  # nobody waits for it
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    schedulers[other].admit([Generate("short", [2] * 9, sampling)])
    assert [prompt_tokens_of(plan) for plan in ranks.turn()][busy] == 8192
    schedulers[busy].admit([Generate("next", [3] * 16384, ONE)])
    steps = [ranks.turn() for _ in range(5)]
    assert [plans[other] is not None for plans in steps] == [True, True, True, False, False]
    assert [prompt_tokens_of(plans[busy]) for plans in steps] == [4096] * 4 + [0]


def test_a_prompt_has_the_whole_step_again_when_nobody_decodes_any_more() -> None:
    ranks = Ranks(2, 1024)
    first, second = ranks.schedulers
    second.admit([Generate("short", [2] * 9, SamplingParams(max_tokens=3, ignore_eos=True))])
    ranks.turn()
    first.admit([Generate("long", [1] * 16384, ONE)])
    steps = [ranks.turn() for _ in range(3)]
    assert [plans[1] is not None for plans in steps] == [True, True, False]
    assert [prompt_tokens_of(plans[0]) for plans in steps] == [4096, 4096, 8192]


@pytest.mark.parametrize("num_dp", [2, 4])
def test_no_rank_waits_longer_for_others_prompts_than_for_its_own(num_dp: int) -> None:
    """One request of a rank at a time, whose prompt may be twice as long as what is worthwhile
    beside decodes; random arrivals, ends and aborts."""
    mixed, draw = 256, random.Random(num_dp)
    ranks = Ranks(num_dp, mixed)
    num_requests, mixed_steps, whole_steps = 0, 0, 0
    live: list[tuple[Scheduler, str]] = []
    for _ in range(1000):
        for each in ranks.schedulers:
            if not each.has_work and draw.random() < 0.15:
                num_requests += 1
                sampling = SamplingParams(max_tokens=draw.choice([1, 2, 9]), ignore_eos=True)
                prompt = [num_requests] * draw.choice([3, 2 * mixed])
                each.admit([Generate(f"{num_requests}", prompt, sampling)])
                live.append((each, f"{num_requests}"))
        if live and draw.random() < 0.05:
            each, request_id = live.pop(draw.randrange(len(live)))
            each.admit([Abort([request_id])])
        plans = ranks.turn()
        most = max(prompt_tokens_of(plan) for plan in plans)
        if any(plan is not None and plan.num_decodes for plan in plans):
            assert most <= mixed
            mixed_steps += most == mixed
        else:
            whole_steps += most == 2 * mixed
    assert mixed_steps > 20
    assert whole_steps > 5
