"""Whole checkpoints in fp8 blocks, with scales in each dtype that is published: token-exact with
transformers on the same numbers as plain weights, and on the fp8 files themselves."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import fp8_files
from tests.support.engine import app_config, folder_model, greedy, offline_engine
from tests.support.models import VOCAB_SIZE, write_tiny_model
from tests.support.oracle import TransformersOracle

NEW_TOKENS = 16
# The last block of most matrices is smaller than the others.
PARTIAL: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "moe_intermediate_size": 160,
    "kv_lora_rank": 160,
    "q_lora_rank": 200,
}
# Blocks are whole, or the only one of a row or column: what transformers' own reader needs.
WHOLE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 32,
}
QUANTIZATION = {
    "qwen3": fp8_files.QWEN,
    "qwen3_moe": fp8_files.QWEN,
    "deepseek_v3": fp8_files.DEEPSEEK,
}

SCALES = (torch.bfloat16, torch.float16, torch.float32)
CASES = [(name, scales, QUANTIZATION[name]) for name in QUANTIZATION for scales in SCALES]
CASES.append(("deepseek_v3", torch.float8_e8m0fnu, fp8_files.DEEPSEEK_V31))


def answers_of(folder: Path, prompts: list[list[int]], **parallel: int | str) -> list[list[int]]:
    config = app_config(
        folder_model(folder), parallel=parallel, engine={"page_size": 4, "kv_cache_tokens": 1024}
    )
    with offline_engine(config) as engine:
        return [answer.token_ids for answer in engine.generate(prompts, greedy(NEW_TOKENS))]


def make_prompts() -> list[list[int]]:
    chooser = random.Random(3)
    return [[chooser.randrange(VOCAB_SIZE - 10) for _ in range(n)] for n in (1, 7, 40)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plain")
    fields = {"qwen3": ("hidden_size", "intermediate_size"), "qwen3_moe": tuple(PARTIAL)[:3]}
    return {
        name: write_tiny_model(
            root / name, name, **{key: PARTIAL[key] for key in fields.get(name, PARTIAL)}
        )
        for name in QUANTIZATION
    }


@pytest.mark.parametrize(("name", "scales", "quantization"), CASES)
def test_tokens_are_those_of_the_dequantised_model(
    name: str,
    scales: torch.dtype,
    quantization: dict[str, Any],
    plain: dict[str, Path],
    tmp_path: Path,
) -> None:
    fp8, twin = fp8_files.write_fp8_twins(plain[name], tmp_path, scales, quantization)
    oracle = TransformersOracle(twin)
    prompts = make_prompts()
    answers = answers_of(fp8, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        oracle.check_greedy(prompt, answer)
    assert len({tuple(answer) for answer in answers}) == len(prompts)


def test_transformers_reads_the_same_files_alike(tmp_path: Path) -> None:
    """Over ranks that cut between blocks: every rank reads its own scales."""
    folder = write_tiny_model(tmp_path / "moe", "qwen3_moe", **WHOLE)
    fp8, _ = fp8_files.write_fp8_twins(folder, tmp_path, torch.bfloat16, fp8_files.QWEN)
    oracle = TransformersOracle(fp8)
    prompts = make_prompts()
    for parallel in ({}, {"plan": "tp_ep", "tp": 2, "ep": 2}, {"tp": 2}):
        for prompt, answer in zip(prompts, answers_of(fp8, prompts, **parallel), strict=True):
            oracle.check_greedy(prompt, answer)
