"""Greedy answers of a tiny random checkpoint are those of transformers, on one rank and on two."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import SeedOssConfig, SeedOssForCausalLM

from core import LLM, SamplingParams

PROMPTS = [[7, 8, 9, 7], [3], [5, 90, 200, 11, 12, 13, 14]]
TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SeedOssForCausalLM]:
    """The checkpoint's folder, and transformers' model of it."""
    torch.manual_seed(0)
    config = SeedOssConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=24, max_position_embeddings=128,
    )  # fmt: skip
    reference = SeedOssForCausalLM(config).float().eval()
    for name, parameter in reference.named_parameters():
        if name.endswith("bias"):  # transformers begins with zeros, which would prove nothing
            torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("seed_oss")
    reference.save_pretrained(folder)
    words = {f"word{token}": token for token in range(config.vocab_size)}
    Tokenizer(WordLevel(words, unk_token="word0")).save(str(folder / "tokenizer.json"))
    return folder, reference


def greedy(reference: SeedOssForCausalLM, prompt: list[int]) -> list[int]:
    """Every token from the whole sequence before it."""
    known = list(prompt)
    with torch.inference_mode():
        for _ in range(TOKENS):
            known.append(int(reference(torch.tensor([known])).logits[0, -1].argmax()))
    return known[len(prompt) :]


@pytest.mark.parametrize("parallel", ["tp1", "tp2"])
def test_its_answers_are_those_of_transformers(
    model: tuple[Path, SeedOssForCausalLM], parallel: str
) -> None:
    folder, reference = model
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    with LLM(
        folder, parallel=parallel, engine={"device": "cpu", "kv_cache_tokens": 1024},
        launch={"threads_per_worker": 1}, **{"model.dtype": "float32"},
    ) as llm:  # fmt: skip
        answers = [answer.token_ids for answer in llm.generate(PROMPTS, sampling)]
    assert answers == [greedy(reference, prompt) for prompt in PROMPTS]
