"""Greedy decoding over GGUF's 4- and 8-bit weights as they are stored, against transformers in
float32 over the dequantised ones.

Kept weights are multiplied with rows in bfloat16, so that tokens of nearly the same logit may
change places: a token that is not transformers' best must be within what that rounding adds up to.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.devices.native_dtypes import native_dtypes
from core.engine.local.in_process import build_in_process, offline_in_process
from tests.support import smollm2
from tests.support.engine import app_config, greedy

TIE = 2.0**-5  # of the best logit, as for bfloat16 (test_token_exact_bf16)
LEAST_EQUAL = 0.95  # of all tokens
NEW_TOKENS = 32
TEXT = (
    "The harbour was quiet that morning. Seven boats came back by noon, and the eighth did not. "
    "To sort a list, first pick an element as the pivot; then move each smaller element before it."
)


@pytest.mark.parametrize(("choice", "most_bytes"), [("keep", 0.45), ("both", 0.8)])
@pytest.mark.skipif(not native_dtypes().grouped, reason="needs AVX2")
def test_tokens_are_those_of_the_dequantised_model_or_nearly(
    monkeypatch: pytest.MonkeyPatch, choice: str, most_bytes: float
) -> None:
    from tokenizers import Tokenizer

    # One thread: beside other load two wait for each other at every operation.
    monkeypatch.setattr("core.engine.local.in_process.os.cpu_count", lambda: 1)
    tokenizer = Tokenizer.from_file(str(Path(smollm2.files().tokenizer_dir) / "tokenizer.json"))
    ids = tokenizer.encode(TEXT).ids
    prompts = [ids[:length] for length in (2, 7, 33)]
    model = replace(smollm2.preset(), dtype="float32", quantized_weights=choice, max_model_len=1024)
    lone = build_in_process(
        app_config(model, engine={"kv_cache_tokens": 4096, "max_running_requests": 4})
    )
    # Matrices at 0.625 bytes a number, at 2 more with a copy, beside a float32 table of tokens.
    assert lone.engine.describe()["weight_bytes"] < most_bytes * 4 * 134.5e6
    answers = offline_in_process(lone).generate(prompts, greedy(NEW_TOKENS))
    judge = smollm2.dequantized(torch.float32).eval()
    num_different = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.token_ids) == NEW_TOKENS
        known = torch.tensor([[*prompt, *answer.token_ids[:-1]]])
        with torch.inference_mode():
            logits_TV = judge(known).logits[0, len(prompt) - 1 :].float()
        for logits_V, token in zip(logits_TV, answer.token_ids, strict=True):
            best = float(logits_V.max())
            gap = (best - float(logits_V[token])) / abs(best)
            assert gap <= TIE, (len(prompt), token, gap)
            num_different += gap > 0
    print(f"{num_different} of {len(prompts) * NEW_TOKENS} tokens tie with transformers'")
    assert num_different <= (1 - LEAST_EQUAL) * NEW_TOKENS * len(prompts)
