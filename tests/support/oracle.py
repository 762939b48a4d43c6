"""Greedy decoding and prompt logprobs by transformers: the oracle of whole models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class TransformersOracle:
    """A checkpoint in transformers, float32, eager attention."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """(tokens, vocabulary) in float32."""
        return self.model(torch.tensor([list(token_ids)])).logits[0].float()

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """What greedy decoding adds to a prompt, every token from the whole sequence before it."""
        known = list(prompt)
        for _ in range(num_tokens):
            known.append(int(self.logits(known)[-1].argmax()))
        return known[len(prompt) :]

    def check_greedy(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Assert that `answer` is what greedy decoding gives: every token is the best one after
        the prompt and the answer's tokens before it."""
        logits = self.logits([*prompt, *answer[:-1]])[len(prompt) - 1 :]
        best = logits.argmax(dim=-1).tolist()
        assert list(answer) == best, f"first difference at {_first_difference(answer, best)}"

    def prompt_logprobs(self, prompt: Sequence[int]) -> torch.Tensor:
        """Logprob of each prompt token after the first, given those before it."""
        logprobs = self.logits(prompt).log_softmax(-1)[:-1]
        return logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
