"""What a GGUF file says about its model, in the terms of a Hugging Face checkpoint.

Holds llama.cpp's names for metadata and tensors, and nothing else does. Knows nothing of torch.
"""

import math
import re
import struct
from typing import Any

from gguf.constants import GGMLQuantizationType

from core.errors import ModelError
from core.loading.gguf_header import GGUFFile

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# llama.cpp stores the rows of these as rotated pairs instead of rotated halves.
PERMUTED_SUFFIXES = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")
ROPE_FACTORS = "rope_freqs.weight"

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


def hf_name(name: str) -> str:
    """The Hugging Face name of a tensor; unknown names stay as they are."""
    block = _BLOCK.fullmatch(name)
    if block is not None and block[2] in _BLOCK_NAMES:
        return f"model.layers.{int(block[1])}.{_BLOCK_NAMES[block[2]]}.{block[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_TOP_NAMES[stem]}.{kind}" if stem in _TOP_NAMES else name


def is_permuted(file: GGUFFile, name: str) -> bool:
    """Whether the rows of a tensor are stored in another order than Hugging Face's."""
    is_llama = file.metadata.get("general.architecture") == "llama"
    return is_llama and name.startswith("blk.") and name.endswith(PERMUTED_SUFFIXES)


def head_dim(file: GGUFFile) -> int:
    """Size of an attention head."""
    arch = file.text("general.architecture")
    hidden_size = file.count(f"{arch}.embedding_length")
    num_heads = max(1, file.count(f"{arch}.attention.head_count"))
    return file.count(f"{arch}.attention.key_length", hidden_size // num_heads)


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The contents of the config.json that this file's model would have."""
    arch = file.text("general.architecture")
    if arch not in ARCHITECTURES:
        raise ModelError(
            f"{file.path}: metadata general.architecture={arch!r} is not supported; allowed: "
            + ", ".join(ARCHITECTURES)
        )
    num_parts = file.count("split.count", 1)
    if num_parts > 1:
        raise ModelError(
            f"{file.path} is one of {num_parts} parts of a model (metadata split.count), which is "
            "not supported; join them with llama.cpp's `llama-gguf-split --merge`"
        )
    if file.count(f"{arch}.expert_count", 0) > 0:
        raise ModelError(f"{file.path}: experts ({arch}.expert_count) are not supported in GGUF")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{file.path}: tensor token_embd.weight is missing")
    num_heads = file.count(f"{arch}.attention.head_count")
    size = head_dim(file)
    return {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_act": "silu",
        "hidden_size": file.count(f"{arch}.embedding_length"),
        "intermediate_size": file.count(f"{arch}.feed_forward_length"),
        "num_hidden_layers": file.count(f"{arch}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.count(f"{arch}.attention.head_count_kv", num_heads),
        "head_dim": size,
        "max_position_embeddings": file.count(f"{arch}.context_length"),
        "rms_norm_eps": file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope_parameters(file, arch),
        "partial_rotary_factor": file.count(f"{arch}.rope.dimension_count", size) / size,
        "dtype": _dtype(file),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
    }


def eos_ids(file: GGUFFile) -> list[int]:
    """Ids that end an answer: end of text, of turn, of message."""
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    return list(dict.fromkeys(file.count(key) for key in keys if key in file.metadata))


def _rope_parameters(file: GGUFFile, arch: str) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": file.number(f"{arch}.rope.freq_base", 10000.0),
    }
    factors = _rope_factors(file)
    if factors is not None:
        # Llama 3's scaling, already worked out for each frequency by the converter.
        return parameters | {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
        }
    kind = file.text(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return parameters
    parameters |= {"rope_type": kind, "factor": file.number(f"{arch}.rope.scaling.factor")}
    original = f"{arch}.rope.scaling.original_context_length"
    if original in file.metadata:
        parameters["original_max_position_embeddings"] = file.count(original)
    return parameters


def _rope_factors(file: GGUFFile) -> list[float] | None:
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.quantization != GGMLQuantizationType.F32:
        raise ModelError(f"{file.path}: tensor {ROPE_FACTORS} must be F32")
    with open(file.path, "rb") as opened:
        opened.seek(tensor.start)
        raw = opened.read(tensor.num_bytes)
    return list(struct.unpack(f"<{math.prod(tensor.shape)}f", raw))


def _dtype(file: GGUFFile) -> str:
    """What the weights were before they were quantised, as far as one can tell."""
    kinds = {tensor.quantization for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if kinds == {GGMLQuantizationType.F32}:
        return "float32"
    return "float16" if kinds == {GGMLQuantizationType.F16} else "bfloat16"
