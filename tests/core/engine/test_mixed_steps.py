"""How many prompt tokens fit beside decodes, by a speed; and how the scheduler spreads prompts."""

import pytest

from core.config import EngineConfig
from core.engine.mixed_steps import LEAST_TOKENS, STEP_S, mixed_tokens
from core.engine.scheduler import BACKLOG_STEPS, Scheduler
from core.interfaces.messages import Generate, SamplingParams, StepPlan, StepResult


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

    def timed(plan: StepPlan) -> float:
        return next(runs) * token_s * sum(plan.lengths)

    assert mixed_tokens(timed, 4095, 8192) == expected


def scheduler(mixed: int | None) -> Scheduler:
    config = EngineConfig(page_size=16, max_prefill_tokens=8192, chunked_prefill_size=8192)
    return Scheduler(config, num_pages=4000, max_model_len=8192, eos_ids=[], mixed_tokens=mixed)


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
