"""Greedy decoding in bfloat16 on a GPU, captured steps and all, against transformers there.

Two bfloat16 implementations round differently, so that tokens of nearly the same logit may change
places. Each token must be transformers' best after the tokens before it, or tie with it.
"""

import random
from pathlib import Path

import pytest
import torch

from core.engine.alone import build_alone, offline_alone
from tests.support.engine import app_config, folder_model, greedy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPT_LENGTHS = [1, 2, 5, 16, 17, 40, 64, 65, 130, 257, 700]
NEW_TOKENS = 96
TIE = 2.0**-6  # of the best logit: two steps of bfloat16
LEAST_EQUAL = 0.95  # of all tokens
TEXT = (
    "The harbour was quiet that morning. Seven boats came back by noon, and the eighth did not. "
    "To sort a list, first pick an element as the pivot; then move each smaller element before it. "
    "Water boils at 100 degrees Celsius at sea level, and at 93 on a mountain of 2,000 metres. "
)


@pytest.fixture(scope="module")
def prompts(smollm2_folder: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json")).encode(TEXT * 12).ids
    chooser = random.Random(1)
    starts = [chooser.choice((0, 3, 40)) for _ in PROMPT_LENGTHS]
    return [ids[start : start + n] for start, n in zip(starts, PROMPT_LENGTHS, strict=True)]


@pytest.mark.parametrize("together", [1, 16], ids=["one at a time", "together"])
def test_tokens_are_transformers_or_tie(
    smollm2_folder: Path, prompts: list[list[int]], together: int
) -> None:
    from transformers import AutoModelForCausalLM

    config = app_config(
        folder_model(smollm2_folder, "bfloat16", max_model_len=1024),
        engine={"device": "cuda", "max_running_requests": together, "kv_cache_tokens": 8192},
    )
    lone = build_alone(config)
    assert lone.engine.describe()["cuda_graphs"]
    answers = offline_alone(lone).generate(prompts, greedy(NEW_TOKENS))
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).cuda()
    num_equal = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor(answer.token_ids, device="cuda")
        assert len(tokens) == NEW_TOKENS
        with torch.inference_mode():
            known = torch.tensor([[*prompt, *answer.token_ids[:-1]]], device="cuda")
            logits = model(known).logits[0, len(prompt) - 1 :].float()
        best = logits.max(1)
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        worse = best.values - chosen > TIE * best.values.abs()
        assert not worse.any(), f"{len(prompt)} tokens: wrong at {worse.nonzero()[0].item()}"
        num_equal += int((tokens == best.indices).sum())
    assert num_equal >= LEAST_EQUAL * NEW_TOKENS * len(prompts)
