"""Greedy answers of MoE models over every kind of plan, token for token those of transformers.

Ranks are threads over the code that processes run. Chunked prefill and the prefix cache are on.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from core.layers.experts.experts import LocalExperts
from core.parallel.experts import LayerPlacement
from core.settings.config import ExpertBalanceConfig, PluginChoice
from tests.support.engine import app_config, folder_model, greedy, spread_engine
from tests.support.models import VOCAB_SIZE
from tests.support.oracle import TransformersOracle

Folder = Callable[[str], Path]
Expected = Callable[[str], list[list[int]]]
MODELS = ["deepseek_v3", "deepseek_v2_lite", "qwen3_moe", "mixtral"]
# (tp, ep, dp): ranks, those that experts are spread over, those that attention is.
PLANS = [
    (1, 1, 1),
    (2, 1, 1),
    (2, 2, 1),
    (2, 2, 2),
    (4, 4, 1),
    (4, 4, 2),
    (4, 4, 4),
    (4, 2, 2),
]
CASES = [(name, plan) for name in MODELS for plan in PLANS]
CASES += [("glm4_moe", plan) for plan in [(1, 1, 1), (2, 1, 1), (2, 2, 2), (4, 2, 2)]]
# DeepEP carries bfloat16 rows, and symm_mem those of GPUs: see tests/contracts.
BACKENDS = {
    "local": PluginChoice(name="local"),
    "allgather": PluginChoice(name="allgather"),
    "nccl": PluginChoice(name="nccl", options={"exchange": "counted"}),
    "nccl-fixed": PluginChoice(name="nccl", options={"exchange": "fixed"}),
}
MAX_TOKENS = 12


def prompts() -> list[list[int]]:
    """Different lengths, some with a common beginning; longer than a chunk."""
    chooser = random.Random(5)
    common = [chooser.randrange(VOCAB_SIZE - 10) for _ in range(20)]
    alone = [[chooser.randrange(VOCAB_SIZE - 10) for _ in range(n)] for n in (1, 3, 16, 40, 75)]
    return [*alone, [*common, *alone[0]], [*common, *alone[3]]]


@pytest.fixture(scope="module")
def expected(tiny_folder: Folder) -> Expected:
    """What transformers answers, computed once for each model."""
    known: dict[str, list[list[int]]] = {}

    def answers(name: str) -> list[list[int]]:
        if name not in known:
            oracle = TransformersOracle(tiny_folder(name))
            known[name] = [oracle.greedy(prompt, MAX_TOKENS) for prompt in prompts()]
        return known[name]

    return answers


def generate(
    folder: Path, plan: tuple[int, int, int], a2a: str, **parallel: object
) -> list[list[int]]:
    """Answers to the prompts, asked twice: the second time much is in the prefix cache."""
    tp, ep, dp = plan
    config = app_config(
        folder_model(folder, max_model_len=256),
        parallel={"plan": "dp_attention", "tp": tp, "ep": ep, "dp_attention": dp, **parallel},
        moe_a2a={"prefill": BACKENDS[a2a], "decode": BACKENDS[a2a]},
        engine={
            "page_size": 4,
            "chunked_prefill_size": 16,
            "max_prefill_tokens": 32,
            "max_running_requests": 8,
            "kv_cache_tokens": 1024,
        },
    )
    with spread_engine(config) as engine:
        first = engine.generate(prompts(), greedy(MAX_TOKENS))
        again = engine.generate(prompts(), greedy(MAX_TOKENS))
        for scheduler in engine.schedulers:
            scheduler.check()
    assert any(answer.num_cached_tokens for answer in again)
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in first]
    return [answer.token_ids for answer in first]


@pytest.mark.parametrize(("name", "plan"), CASES, ids=str)
def test_plans_give_the_tokens_of_transformers(
    name: str, plan: tuple[int, int, int], tiny_folder: Folder, expected: Expected
) -> None:
    names = ["local"] if plan[1] == 1 else ["allgather", "nccl"]
    names += ["nccl-fixed"] if plan[2] > 1 else []  # ranks with unequal rows
    for a2a in names:
        assert generate(tiny_folder(name), plan, a2a) == expected(name), a2a


@pytest.mark.parametrize(
    "options",
    [
        {"dp_lm_head": True},
        {"dense_tp": 1},
        {"dense_tp": 4},
        {"redundant_experts": 4},
    ],
    ids=str,
)
def test_options_of_a_plan_change_no_token(
    options: dict[str, object], tiny_folder: Folder, expected: Expected
) -> None:
    name = "deepseek_v3"
    assert generate(tiny_folder(name), (4, 4, 2), "nccl", **options) == expected(name)


@pytest.mark.parametrize("plan", [(2, 2, 1), (4, 2, 2), (4, 4, 4)], ids=str)
def test_moving_experts_while_serving_changes_no_token(
    plan: tuple[int, int, int],
    tiny_folder: Folder,
    expected: Expected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moves: list[LayerPlacement] = []
    move = LocalExperts.move

    def counted(self: LocalExperts, placement: LayerPlacement) -> None:
        moves.append(placement)
        move(self, placement)

    monkeypatch.setattr(LocalExperts, "move", counted)
    name = "deepseek_v3"
    eplb = ExpertBalanceConfig(interval_steps=5)
    answers = generate(tiny_folder(name), plan, "nccl", redundant_experts=4, eplb=eplb)
    assert answers == expected(name)
    assert len(moves) >= 2 * plan[0]  # of each rank, some layers
