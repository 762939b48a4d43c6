"""Made-up steps stay within the scheduler's limits, and reach them."""

import pytest

from core.engine.run.lockstep import rank_facts
from core.engine.step.profile_steps import (
    COSTLIEST,
    captured_prefill,
    kernel_steps,
    largest_decode,
    largest_prefills,
    row_counts,
)
from core.interfaces.messages import ScheduledStep
from core.settings.config import EngineConfig

LIMITS = [
    (EngineConfig(), 4096),
    (EngineConfig(), 131072),
    (EngineConfig(max_running_requests=1), 17),
    (EngineConfig(max_running_requests=1), 1),
    (EngineConfig(max_running_requests=3, max_prefill_tokens=10, chunked_prefill_size=4), 64),
    (EngineConfig(max_running_requests=8, chunked_prefill_size=-1, max_prefill_tokens=16), 100),
    (EngineConfig(max_running_requests=512, max_prefill_tokens=64), 8),
]


def check(plan: ScheduledStep, engine: EngineConfig, max_model_len: int) -> None:
    count = len(plan.slots)
    assert 1 <= count <= engine.running_limit
    assert plan.slots == [init.slot for init in plan.inits] == list(range(count))
    assert len(plan.starts) == len(plan.lengths) == len(plan.samples) == count
    assert plan.lengths[: plan.num_decodes] == [1] * plan.num_decodes
    prompts = plan.lengths[plan.num_decodes :]
    for start, length in zip(plan.starts, plan.lengths, strict=True):
        assert start >= 0
        assert length >= 1
        assert start + length <= max_model_len
    if engine.chunked_prefill_size == -1:
        assert sum(prompts) <= max(engine.max_prefill_tokens, max_model_len)
    else:
        assert sum(prompts) <= engine.max_prefill_tokens
        assert max(prompts, default=0) <= engine.chunked_prefill_size


@pytest.mark.parametrize(("engine", "max_model_len"), LIMITS)
def test_every_step_is_one_the_scheduler_could_plan(
    engine: EngineConfig, max_model_len: int
) -> None:
    for plan in (
        *kernel_steps(engine, max_model_len, decodes=True),
        *kernel_steps(engine, max_model_len, decodes=False),
        largest_decode(engine, max_model_len),
        *largest_prefills(engine, max_model_len, COSTLIEST),
    ):
        check(plan, engine, max_model_len)


@pytest.mark.parametrize(("engine", "max_model_len"), LIMITS)
def test_the_largest_reach_the_limits(engine: EngineConfig, max_model_len: int) -> None:
    decode = largest_decode(engine, max_model_len)
    assert len(decode.slots) == engine.running_limit
    assert max(decode.starts) == max_model_len - 1
    budget = engine.max_prefill_tokens
    if engine.chunked_prefill_size == -1:
        budget = max(budget, max_model_len)
    budget = min(budget, engine.running_limit * max_model_len)
    plans = largest_prefills(engine, max_model_len)
    if engine.chunked_prefill_size == -1 or budget <= engine.chunked_prefill_size:
        assert any(sum(plan.lengths) >= budget for plan in plans)
    assert all(len(plan.slots) == engine.running_limit for plan in plans)


def test_default_limits_give_as_many_rows_as_a_step_may_have() -> None:
    few, many = largest_prefills(EngineConfig(), 4096)
    assert sum(few.lengths) == 8192 + 256 - 4
    assert sum(many.lengths) == 8192
    assert len(many.slots) - many.num_decodes == 256


def test_prompt_logprobs_are_counted_as_wanted() -> None:
    plan = largest_prefills(EngineConfig(), 4096, COSTLIEST)[0]
    assert rank_facts(0, plan, busy=True).logprob_rows == 2048 - 1
    wanted = sum(
        min(length, init.num_prompt - 1 - start)
        for init, start, length in zip(
            plan.inits[plan.num_decodes :],
            plan.starts[plan.num_decodes :],
            plan.lengths[plan.num_decodes :],
            strict=True,
        )
        if init.sampling.prompt_logprobs is not None
    )
    assert wanted == plan.num_logprob_rows


@pytest.mark.parametrize("max_model_len", [2048, 4096])
def test_prompts_of_every_size_fill_a_step(max_model_len: int) -> None:
    """Which kernel attends depends on both: short prompts in numbers take others than long ones."""
    engine = EngineConfig()
    met = {
        (plan.starts[0] > 0, plan.lengths[0])
        for plan in kernel_steps(engine, max_model_len, decodes=False)
        if len(set(plan.lengths)) == 1
        and len(plan.slots) == min(engine.running_limit, 8192 // plan.lengths[0])
    }
    for length in (25, 97, 193, 1537):
        assert {(False, length), (True, length)} <= met


def test_row_counts_hold_powers_of_two_and_numbers_nothing_divides() -> None:
    assert row_counts(1) == [1]
    assert row_counts(20) == [1, 2, 4, 7, 8, 13, 16, 20]
    assert row_counts(256)[-3:] == [128, 193, 256]


@pytest.mark.parametrize(
    ("rows", "longest", "lengths"),
    [(1024, 4096, [1024]), (1024, 400, [400, 400]), (1024, 100, [100] * 3), (64, 64, [64])],
)
def test_a_captured_step_with_prompts_has_most_of_its_rows(
    rows: int, longest: int, lengths: list[int]
) -> None:
    engine = EngineConfig(max_running_requests=3, chunked_prefill_size=-1)
    assert captured_prefill(engine, longest, rows).lengths == lengths
