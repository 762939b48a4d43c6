"""The contract of model families: a tiny random checkpoint answers as it does in transformers.

    from core.testing.model import TINY, check_model, write_checkpoint

    @pytest.fixture(scope="module")
    def folder(tmp_path_factory):
        torch.manual_seed(0)
        model = SeedOssForCausalLM(SeedOssConfig(**TINY))
        return write_checkpoint(model, tmp_path_factory.mktemp("seed_oss"))

    @pytest.mark.parametrize("parallel", ["tp1", "tp2"])
    def test_contract(folder, parallel):
        check_model(folder, parallel=parallel)

Token for token, from whole engines with their processes; so the family's plugin must be installed.
"""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.interfaces.messages import SamplingParams
from core.llm.model import LLM
from core.model_files.byte_tokenizer import byte_tokenizer_dir

# Of a config in transformers' names. 12 query and 4 KV heads: tp 2 and 4 cut KV heads, tp 12
# repeats them.
TINY: dict[str, Any] = {
    "vocab_size": 263,  # a prime: no tp divides it
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # large, so that answers are not ties
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
}
PROMPT_TOKENS = (1, 5, 40, 17)  # of the prompts that are asked; a page has 16


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
        logits: torch.Tensor = self.model(torch.tensor([list(token_ids)])).logits[0]
        return logits.float()

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


def write_checkpoint(model: Any, folder: Path) -> Path:
    """Save a model of transformers in `folder`, in float32, with a tokenizer of bytes; returns the
    folder. What transformers starts at 0 or 1 (biases, norms) gets random numbers, as otherwise a
    family that leaves it out would pass."""
    model = model.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            assert parameter.abs().sum() > 0, name
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(folder)
    for file in byte_tokenizer_dir(model.config.vocab_size).iterdir():
        shutil.copy(file, folder)
    return folder


def check_model(
    folder: Path,
    *,
    parallel: str = "tp1",
    reference: Path | None = None,
    num_tokens: int = 24,
    settings: dict[str, Any] | None = None,
) -> None:
    """Start an engine on the CPU with the plan `parallel`, ask it several prompts at once, and
    compare every token with transformers, in float32. Raises AssertionError.

    `reference`: the folder that transformers reads, where `folder` holds the same in another form.
    `settings`: of the engine, by key, beside those that this sets.
    """
    oracle = TransformersOracle(reference or folder)
    source = random.Random(0)
    vocab_size = int(oracle.model.config.vocab_size)
    prompts = [[source.randrange(vocab_size) for _ in range(count)] for count in PROMPT_TOKENS]
    ours = {
        "parallel": parallel,
        "model.dtype": "float32",
        "engine.device": "cpu",
        "engine.kv_cache_tokens": 2048,
        "launch.threads_per_worker": 1,
    }
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    with LLM(folder, **(ours | (settings or {}))) as llm:
        answers = llm.generate(prompts, sampling)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.token_ids) == num_tokens
        oracle.check_greedy(prompt, answer.token_ids)


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
