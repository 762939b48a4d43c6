"""What becomes of a message: seeds, limits and refusals, without a scheduler."""

import pytest

from core.engine.schedule.intake import Intake
from core.interfaces.messages import Generate, SamplingParams
from core.settings.config import EngineConfig


def new_intake(dp_rank: int = 0, seed: int = 0) -> Intake:
    return Intake(
        EngineConfig(seed=seed),
        dp_rank=dp_rank,
        max_model_len=100,
        pool_tokens=80,
        eos_ids=[2],
        clock=lambda: 50.0,
    )


def ask(**sampling: int) -> Generate:
    return Generate("a", [1, 2, 3], SamplingParams(**({"max_tokens": 10} | sampling)))


def seeds(intake: Intake) -> list[int]:
    return [intake.request(ask()).seed for _ in range(3)]


def test_each_dp_rank_draws_other_seeds_and_the_same_ones_again() -> None:
    drawn = [tuple(seeds(new_intake(dp_rank))) for dp_rank in range(4)]
    assert len({seed for of_rank in drawn for seed in of_rank}) == 12
    assert drawn == [tuple(seeds(new_intake(dp_rank))) for dp_rank in range(4)]
    assert seeds(new_intake(seed=1)) != seeds(new_intake())


def test_a_seed_of_its_own_moves_nobody_elses() -> None:
    intake = new_intake()
    first = intake.request(ask()).seed
    assert intake.request(ask(seed=-1)).seed == 2**64 - 1
    last = intake.request(ask()).seed
    assert [first, last] == seeds(new_intake())[::2]


@pytest.mark.parametrize(
    ("num_prompt", "words"),
    [(0, "no tokens"), (80, "engine.kv_cache_tokens"), (100, "model.max_model_len")],
)
def test_a_prompt_that_can_never_run_names_the_key_that_limits_it(
    num_prompt: int, words: str
) -> None:
    problem = new_intake().problem(num_prompt)
    assert problem is not None
    assert words in problem
    assert new_intake().problem(79) is None


def test_an_answer_may_be_one_token_longer_than_the_pool() -> None:
    assert new_intake().request(ask()).max_tokens_total == 13
    assert new_intake().request(ask(max_tokens=1000)).max_tokens_total == 81
