"""Greedy decoding in float32 equals transformers', token for token, whatever the engine does:
page sizes, chunks, prefix cache, preemption, batching and tensor parallelism.

The first configuration is checked against transformers; the others must give the same tokens.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from core.settings.config import PluginChoice
from tests.support.engine import app_config, folder_model, greedy, offline_engine
from tests.support.oracle import TransformersOracle

PROMPT_LENGTHS = [
    *(1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 18, 24, 31),
    *(32, 33, 40, 47, 48, 49, 63, 64, 65, 80, 97, 128, 129, 200, 257, 700),
]
NEW_TOKENS = 12
TEXT = (
    "The history of computing is full of machines that were built for one purpose and used for "
    "another. In 1936 a young mathematician described a machine that reads and writes symbols on a "
    "tape. def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)  # slow! "
    "What is the capital of France? Paris, of course; and that of Japan is Tokyo (東京). "
)


@pytest.fixture(scope="module")
def oracle(smollm2_folder: Path) -> TransformersOracle:
    return TransformersOracle(smollm2_folder)


@pytest.fixture(scope="module")
def prompts(smollm2_folder: Path) -> list[list[int]]:
    """32 prompts; some share beginnings, so that the prefix cache and shared pages matter."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json")).encode(TEXT * 8).ids
    chooser = random.Random(0)
    starts = [chooser.choice((0, 0, 7, 50)) for _ in PROMPT_LENGTHS]
    return [ids[start : start + n] for start, n in zip(starts, PROMPT_LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def expected(
    smollm2_folder: Path, oracle: TransformersOracle, prompts: list[list[int]]
) -> list[list[int]]:
    """The engine's tokens with defaults, all requests at once, checked against transformers."""
    answers = run(smollm2_folder, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        oracle.check_greedy(prompt, answer)
    return answers


def run(folder: Path, prompts: list[list[int]], **sections: dict[str, Any]) -> list[list[int]]:
    config = app_config(folder_model(folder, max_model_len=1024), **sections)
    with offline_engine(config) as engine:
        answers = engine.generate(prompts, greedy(NEW_TOKENS))
        engine.scheduler.check()
        stats = engine.scheduler.stats()
    assert stats.num_running == stats.num_waiting == 0
    return [answer.token_ids for answer in answers]


CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "one at a time": {"engine": {"max_running_requests": 1}},
    "batch of 16": {"engine": {"max_running_requests": 16}},
    "page size 1": {"engine": {"page_size": 1}},
    "page size 64, chunks of 16": {"engine": {"page_size": 64, "chunked_prefill_size": 16}},
    "no chunks, no prefix cache": {
        "engine": {"chunked_prefill_size": -1, "disable_prefix_cache": True}
    },
    "chunks of 16, few prefill tokens": {
        "engine": {"chunked_prefill_size": 16, "max_prefill_tokens": 48}
    },
    "oracle attention": {
        "attention": {
            "prefill": PluginChoice(name="torch_ref"),
            "decode": PluginChoice(name="torch_ref"),
        }
    },
    "tp 3": {"parallel": {"tp": 3}, "engine": {"max_running_requests": 16}},
}


# What tiny models show too (test_families, test_plans).
SLOW = {
    "batch of 16",
    "page size 1",
    "no chunks, no prefix cache",
    "chunks of 16, few prefill tokens",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CONFIGURATIONS],
)
def test_same_tokens(
    name: str, smollm2_folder: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    assert run(smollm2_folder, prompts, **CONFIGURATIONS[name]) == expected


def test_same_tokens_when_preempted(
    smollm2_folder: Path, oracle: TransformersOracle, prompts: list[list[int]]
) -> None:
    """A pool that holds a fraction of what 16 requests grow to."""
    config = app_config(
        folder_model(smollm2_folder, max_model_len=128),
        engine={"kv_cache_tokens": 320, "max_running_requests": 16},
    )
    with offline_engine(config) as engine:
        answers = engine.generate(prompts[:16], greedy(64))
        engine.scheduler.check()
        assert engine.scheduler.stats().num_preemptions > 0
    for prompt, answer in zip(prompts[:16], answers, strict=True):
        oracle.check_greedy(prompt, answer.token_ids)


def test_prefix_cache_is_used_and_changes_nothing(
    smollm2_folder: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    config = app_config(folder_model(smollm2_folder, max_model_len=1024))
    with offline_engine(config) as engine:
        first = engine.generate(prompts, greedy(NEW_TOKENS))
        again = engine.generate(prompts, greedy(NEW_TOKENS))
        engine.scheduler.check()
    assert [answer.token_ids for answer in first] == expected
    assert [answer.token_ids for answer in again] == expected
    for prompt, answer in zip(prompts, again, strict=True):
        assert answer.num_cached_tokens == (len(prompt) - 1) // 16 * 16


def test_prompt_logprobs(
    smollm2_folder: Path, oracle: TransformersOracle, prompts: list[list[int]]
) -> None:
    config = app_config(
        folder_model(smollm2_folder, max_model_len=1024), engine={"chunked_prefill_size": 64}
    )
    chosen = [prompt for prompt in prompts if len(prompt) in (1, 2, 16, 65, 257)]
    with offline_engine(config) as engine:
        answers = engine.generate(chosen, greedy(2, prompt_logprobs=3, logprobs=2))
    for prompt, answer in zip(chosen, answers, strict=True):
        assert [entry.token_id for entry in answer.prompt_logprobs] == prompt[1:]
        ours = [entry.logprob for entry in answer.prompt_logprobs]
        assert ours == pytest.approx(oracle.prompt_logprobs(prompt).tolist(), abs=1e-3)
        assert all(len(entry.top_ids) == 3 for entry in answer.prompt_logprobs)
        logprobs = oracle.logits([*prompt, *answer.token_ids])[len(prompt) - 1 : -1].log_softmax(-1)
        for entry, row in zip(answer.logprobs, logprobs, strict=True):
            assert entry.top_ids == row.topk(2).indices.tolist()
            assert entry.rank == 1
            assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-3)
