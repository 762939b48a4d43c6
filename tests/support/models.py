"""Tiny random checkpoints written by transformers, and what it takes to run a model on them.

Shape legend: T tokens, H and G query and KV heads of a rank, D head dimension, V vocabulary.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.config import ModelConfig
from core.interfaces.comm import SOLO, Comms
from core.interfaces.control import ModelFiles
from core.interfaces.model import BuildContext, Model, ModelFamily
from core.kernels.torch_ops import TorchOps
from core.loading.byte_tokenizer import byte_tokenizer_dir
from core.loading.files import resolve_files
from core.loading.open import open_weights
from plugins.models import llama, qwen3
from tests.support.ranks import run_ranks, tp_comms

CPU = torch.device("cpu")
VOCAB_SIZE = 263  # a prime: no tp divides it
# 12 query and 4 KV heads: tp 2 and 4 cut KV heads, tp 12 repeats them.
TINY: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
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
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
# Name of a tiny checkpoint -> (transformers' prefix of the family's classes, config changes).
# "odd" is like SmolLM2: 9 heads over 3 KV heads, so that tp 3 and 9 are what it allows.
TINY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_odd": (
        "Llama",
        {
            "hidden_size": 144,
            "intermediate_size": 180,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama_biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_linear": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3_tied": ("Qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
}


def write_tiny_model(folder: Path, name: str, seed: int = 0) -> Path:
    """A Hugging Face folder with random float32 weights and a byte tokenizer."""
    import transformers

    prefix, changes = TINY_MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**(TINY | changes))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).float()
    with torch.no_grad():  # what transformers starts at 0 or 1 would hide mistakes
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            assert parameter.abs().sum() > 0, parameter_name
    model.save_pretrained(folder)
    for file in byte_tokenizer_dir(VOCAB_SIZE).iterdir():
        shutil.copy(file, folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in config.items() if v is not None}))


def family_of(hf_config: dict[str, Any]) -> ModelFamily:
    """The built-in family of a config.json."""
    options = llama.NoOptions()
    return {
        "LlamaForCausalLM": llama.family,
        "MistralForCausalLM": llama.mistral_family,
        "Qwen2ForCausalLM": qwen3.qwen2_family,
        "Qwen3ForCausalLM": qwen3.family,
    }[hf_config["architectures"][0]](options)


def ignore_progress(task: str, done: int, total: int, unit: str) -> None:
    """For callers who don't want to know."""


def folder_files(folder: Path | str) -> ModelFiles:
    """A model's files."""
    return resolve_files(ModelConfig(name="tiny", path=str(folder)), ignore_progress)


def build_model(
    files: ModelFiles, comms: Comms = SOLO, dtype: torch.dtype = torch.float32
) -> Model:
    """One rank's part of a checkpoint, on the CPU."""
    family = family_of(files.hf_config)
    config = ModelConfig(name="tiny")
    reader = open_weights(config, files, dtype=dtype, device=CPU, on_progress=ignore_progress)
    context = BuildContext(weights=reader, comms=comms, ops=TorchOps(), dtype=dtype, device=CPU)
    model = family.build(family.parse(files.hf_config), context)
    reader.finish()
    return model


@dataclass
class DenseAttention:
    """core.interfaces.attention.AttentionStep over one sequence that keeps all k and v."""

    scale: float
    caches: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        if layer in self.caches:
            k_TGD = torch.cat((self.caches[layer][0], k_TGD))
            v_TGD = torch.cat((self.caches[layer][1], v_TGD))
        self.caches[layer] = (k_TGD.clone(), v_TGD.clone())
        group = q_THD.shape[1] // k_TGD.shape[1]
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1).float() for x in (k_TGD, v_TGD))
        scores = q_THD.transpose(0, 1).float() @ k.transpose(1, 2) * self.scale
        new, old = q_THD.shape[0], k_TGD.shape[0] - q_THD.shape[0]
        hidden = torch.ones(new, old + new, dtype=torch.bool).triu(old + 1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return (weights @ v).transpose(0, 1).to(q_THD.dtype)


@torch.inference_mode()
def run_model(model: Model, token_ids: Sequence[int], chunk: int | None = None) -> Tensor:
    """Logits (T, V) of a sequence, in steps of `chunk` tokens."""
    attention = DenseAttention(model.kv.scale)
    chunk = chunk or len(token_ids)
    rows = []
    for start in range(0, len(token_ids), chunk):
        ids_T = torch.tensor(token_ids[start : start + chunk])
        positions_T = torch.arange(start, start + len(ids_T))
        rows.append(model.logits(model.forward(ids_T, positions_T, attention)))
    return torch.cat(rows)


def tp_logits(files: ModelFiles, tp: int, token_ids: Sequence[int]) -> list[Tensor]:
    """Logits (T, V) as each of `tp` ranks computes them."""
    return run_ranks(tp_comms(tp), lambda comms: run_model(build_model(files, comms), token_ids))
