"""The sampler as the runner uses it, for tests of it alone."""

import torch

from core.engine.sample.sampler import Sampler
from core.interfaces.messages import SamplingParams, SlotInit

CPU = torch.device("cpu")
EOS = 3
NUM_SLOTS = 128

# Sixteen requests that differ in everything.
MIXED = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.3},
    {"temperature": 1.5, "top_k": 40},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.3, "top_k": 20, "temperature": 0.8},
    {"min_p": 0.05},
    {"min_p": 0.01, "top_p": 0.95},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.0, "temperature": 0.0},
    {"frequency_penalty": 0.7, "top_p": 0.8},
    {"logit_bias": {5: 12.0, 9: -100.0}},
    {"logit_bias": {7: 9.0}, "temperature": 0.0},
    {"min_tokens": 4, "stop_token_ids": [28, 30]},
    {"temperature": 2.0, "top_k": 128, "top_p": 0.99, "min_p": 0.001, "repetition_penalty": 0.9},
]


def params(**fields) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, **fields})


class Pool:
    """A sampler with the runner's token pool beside it."""

    def __init__(self, vocab_size: int, device: torch.device = CPU, num_slots: int = NUM_SLOTS):
        self.sampler = Sampler(
            max_slots=num_slots, vocab_size=vocab_size, device=device, eos_ids=[EOS]
        )
        self.tokens_SL = torch.zeros((num_slots, 64), dtype=torch.int32, device=device)

    def add(self, slot, sampling, *, seed=0, tokens=(1,), num_prompt=None):
        tokens = list(tokens)
        num_prompt = len(tokens) if num_prompt is None else num_prompt
        self.sampler.init_slots([SlotInit(slot, tokens, num_prompt, sampling, seed)])
        self.tokens_SL[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)

    def sample(self, logits_RV, slots, positions) -> torch.Tensor:
        plan = self.sampler.prepare(slots, positions)
        return self.sampler.sample(plan, logits_RV, self.tokens_SL)

    def one(self, logits_V, sampling, *, seed=0, tokens=(1,), num_prompt=None) -> int:
        """The token after `tokens`."""
        tokens = list(tokens)
        self.add(0, sampling, seed=seed, tokens=tokens, num_prompt=num_prompt)
        return int(self.sample(logits_V[None], [0], [len(tokens)]))
