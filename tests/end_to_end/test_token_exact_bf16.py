"""Greedy decoding in bfloat16 against transformers; on a GPU with captured steps.

Two bfloat16 implementations round differently, so that tokens of nearly the same logit may change
places. Each token must be transformers' best after the tokens before it; where it is not, the two
logits must tie in transformers' bfloat16 and be as close as its rounding goes in float32.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from core.engine.local.in_process import build_in_process, offline_in_process
from tests.support.engine import app_config, folder_model, greedy

TIE = 2.0**-6  # of the best logit: two steps of bfloat16
TIE_FLOAT32 = 2.0**-5  # of the best logit: what rounding in 30 layers adds up to
LEAST_EQUAL = 0.95  # of all tokens
TEXT = (
    "The harbour was quiet that morning. Seven boats came back by noon, and the eighth did not. "
    "To sort a list, first pick an element as the pivot; then move each smaller element before it. "
    "Water boils at 100 degrees Celsius at sea level, and at 93 on a mountain of 2,000 metres. "
)


@dataclass(frozen=True)
class Size:
    """How much a device is given to do."""

    prompt_lengths: tuple[int, ...]
    new_tokens: int


SIZES = {
    "cpu": Size((2, 17, 64), 32),
    "cuda": Size((1, 2, 5, 16, 17, 40, 64, 65, 130, 257, 700), 96),
}


@dataclass(frozen=True)
class Difference:
    """A token that is not transformers' best: by how much of the best logit it is less."""

    position: int
    bfloat16: float
    float32: float


class Judge:
    """transformers in bfloat16 and float32 on one device."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM

        self._device = device
        self._models: list[Any] = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
            .to(device)
            .eval()
            for dtype in (torch.bfloat16, torch.float32)
        ]

    @torch.inference_mode()
    def differences(self, prompt: list[int], answer: list[int]) -> list[Difference]:
        """Every one of an answer, each token judged after the answer's own tokens before it."""
        known = torch.tensor([[*prompt, *answer[:-1]]], device=self._device)
        bf16_TV, float32_TV = (
            model(known).logits[0, len(prompt) - 1 :].float() for model in self._models
        )
        best_T = bf16_TV.argmax(1).tolist()
        found = []
        for position, (token, best) in enumerate(zip(answer, best_T, strict=True)):
            if token != best:
                gaps = [
                    ((row[best] - row[token]).abs() / row[best].abs()).item()
                    for row in (bf16_TV[position], float32_TV[position])
                ]
                found.append(Difference(position, *gaps))
        return found


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def prompts(smollm2_folder: Path, device: str) -> list[list[int]]:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json")).encode(TEXT * 12).ids
    chooser = random.Random(1)
    lengths = SIZES[device].prompt_lengths
    starts = [chooser.choice((0, 3, 40)) for _ in lengths]
    return [ids[start : start + n] for start, n in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def judge(smollm2_folder: Path, device: str) -> Judge:
    return Judge(smollm2_folder, device)


@pytest.mark.parametrize("together", [1, 16], ids=["one at a time", "together"])
def test_tokens_are_transformers_or_tie(
    smollm2_folder: Path, prompts: list[list[int]], judge: Judge, device: str, together: int
) -> None:
    config = app_config(
        folder_model(smollm2_folder, "bfloat16", max_model_len=1024),
        engine={"device": device, "max_running_requests": together, "kv_cache_tokens": 8192},
    )
    lone = build_in_process(config)
    captured = lone.engine.describe().get("cuda_graphs")
    assert device == "cpu" or "decode steps" in str(captured), captured
    new_tokens = SIZES[device].new_tokens
    answers = offline_in_process(lone).generate(prompts, greedy(new_tokens))
    num_different = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.token_ids) == new_tokens
        found = judge.differences(prompt, list(answer.token_ids))
        for difference in found:
            told = f"prompt of {len(prompt)} tokens: {difference}"
            print(told)
            assert difference.bfloat16 <= TIE, told
            assert difference.float32 <= TIE_FLOAT32, told
        num_different += len(found)
    print(
        f"{num_different} of {len(prompts) * new_tokens} tokens tie with transformers'; {captured}"
    )
    assert num_different <= (1 - LEAST_EQUAL) * new_tokens * len(prompts)
