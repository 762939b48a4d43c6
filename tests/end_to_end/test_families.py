"""Every model family, in tiny random configurations, over tp: token-exact with transformers."""

import random
from pathlib import Path

import pytest

from tests.support.engine import app_config, folder_model, greedy, offline_engine
from tests.support.models import TINY_MODELS, VOCAB_SIZE, write_tiny_model
from tests.support.oracle import TransformersOracle

NEW_TOKENS = 16
CASES = [
    ("llama", 1),
    ("llama", 2),
    ("llama", 4),
    ("llama_tied", 2),
    ("llama_biased", 4),
    ("llama_odd", 3),
    ("llama_yarn", 1),
    ("llama_linear", 1),
    ("mistral", 2),
    ("qwen2", 2),
    ("qwen3", 1),
    ("qwen3", 2),
    ("qwen3", 4),
    ("qwen3_tied", 1),
    ("qwen3_moe", 1),
    ("mixtral", 2),
    ("deepseek_v3", 1),
    ("deepseek_v2_lite", 2),
    ("deepseek_v2", 1),
    ("deepseek_v3_halves", 2),
    ("glm4_moe", 1),
    ("glm4_moe_air", 2),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: write_tiny_model(root / name, name) for name in TINY_MODELS}


def test_every_family_is_covered() -> None:
    assert {name for name, _ in CASES} == set(TINY_MODELS)


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_token_exact(name: str, tp: int, folders: dict[str, Path]) -> None:
    chooser = random.Random(7)
    shared = [chooser.randrange(VOCAB_SIZE - 10) for _ in range(40)]
    prompts = [
        shared[: chooser.randrange(40)] + [chooser.randrange(VOCAB_SIZE - 10) for _ in range(tail)]
        for tail in (1, 2, 7, 16, 33, 90)
    ]
    config = app_config(
        folder_model(folders[name]),
        parallel={"tp": tp},
        engine={"chunked_prefill_size": 16, "page_size": 4, "kv_cache_tokens": 2048},
    )
    with offline_engine(config) as engine:
        answers = engine.generate(prompts, greedy(NEW_TOKENS))
        engine.scheduler.check()
    oracle = TransformersOracle(folders[name])
    for prompt, answer in zip(prompts, answers, strict=True):
        oracle.check_greedy(prompt, answer.token_ids)
