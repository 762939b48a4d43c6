"""What a GGUF file says about its model, in the terms of a Hugging Face checkpoint.

Holds llama.cpp's names for metadata and tensors, and nothing else does. Knows nothing of torch.
"""

import math
import re
import struct
from typing import Any

from gguf.constants import GGMLQuantizationType

from core.disk.plain_files import open_plain
from core.errors import ModelError
from plugins.checkpoints._gguf.header import GGUFFile

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# llama.cpp stores the rows of these as rotated pairs instead of rotated halves.
PERMUTED_SUFFIXES = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")
ROPE_FACTORS = "rope_freqs.weight"
# Formats of matrices that are whole numbers in groups of 32 columns, and the numbers' bits
# (core.interfaces.weights.GroupedInts).
GROUPED_BITS = {
    GGMLQuantizationType.Q4_0: 4,
    GGMLQuantizationType.Q4_1: 4,
    GGMLQuantizationType.Q4_K: 4,
    GGMLQuantizationType.Q8_0: 8,
}

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
# Keys of config.json whose value is one number of the metadata, below the architecture's name.
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
_OTHER_NAMES = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "rope_parameters": "rope.scaling",
    "rope_scaling": "rope.scaling",
}
_READ = frozenset(
    {
        "attention.sliding_window", "attention.value_length", "expert_count",
        "rope.dimension_count", "rope.scale_linear",
        "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
        "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    }
)  # fmt: skip
# Metadata that would change what is computed, and the values that do not.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
_IGNORED = frozenset(
    {
        "vocab_size",  # the embedding has as many rows
        "tensor_data_layout",  # a note of the converter
        "expert_used_count",  # where there are no experts
        "rope.scaling.finetuned",  # whether training saw that length
        "pooling_type",  # of embedding models
    }
)
_MAX_ROPE_FACTORS = 4096
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


def hf_name(name: str) -> str:
    """The Hugging Face name of a tensor; unknown names stay as they are."""
    block = _BLOCK.fullmatch(name)
    if block is not None and block[2] in _BLOCK_NAMES:
        return f"model.layers.{int(block[1])}.{_BLOCK_NAMES[block[2]]}.{block[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_TOP_NAMES[stem]}.{kind}" if stem in _TOP_NAMES else name


def group_bits(file: GGUFFile) -> dict[str, int]:
    """Bits of every matrix in groups, by its Hugging Face name."""
    return {
        hf_name(name): GROUPED_BITS[tensor.quantization]
        for name, tensor in file.tensors.items()
        if len(tensor.shape) == 2 and tensor.quantization in GROUPED_BITS
    }


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
    size = head_dim(file)
    _refuse_what_is_not_computed(file, arch, size)
    values = {key: file.count(f"{arch}.{name}") for key, name in _SIZES.items()}
    num_heads = values["num_attention_heads"]
    config = values | {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_act": "silu",
        "num_key_value_heads": file.count(f"{arch}.attention.head_count_kv", num_heads),
        "head_dim": size,
        "rms_norm_eps": file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope_parameters(file, arch),
        "dtype": _dtype(file),
    }
    if arch != "qwen2":  # whose biases are always there
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if arch == "llama":
        config["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    return config


def key_names(file: GGUFFile) -> dict[str, str]:
    """How this file calls the keys of `hf_config`, for errors."""
    arch = file.text("general.architecture")
    names = _SIZES | _OTHER_NAMES
    return {key: f"{file.path}: metadata {arch}.{name}" for key, name in names.items()} | {
        "vocab_size": f"{file.path}: rows of tensor token_embd.weight",
        "architectures": f"{file.path}: metadata general.architecture",
    }


def metadata_warnings(file: GGUFFile) -> list[str]:
    """Metadata of this kind of model that says something unknown."""
    prefix = f"{file.text('general.architecture')}."
    known = {*_SIZES.values(), *_OTHER_NAMES.values(), *_NEUTRAL, *_READ, *_IGNORED}
    unknown = sorted(
        key for key in file.metadata if key.startswith(prefix) and key[len(prefix) :] not in known
    )
    if not unknown:
        return []
    shown = ", ".join(key[:60] for key in unknown[:10]) + (", ..." if len(unknown) > 10 else "")
    return [f"{file.path} has metadata that is not known and is ignored: {shown}"]


def _refuse_what_is_not_computed(file: GGUFFile, arch: str, head_size: int) -> None:
    """Raise ModelError for metadata that would change what is computed."""
    sizes = {"attention.value_length": head_size, "rope.dimension_count": head_size}
    for name, needed in sizes.items():
        if file.count(f"{arch}.{name}", needed) != needed:
            value = file.metadata[f"{arch}.{name}"]
            raise ModelError(
                f"{file.path}: metadata {arch}.{name}={value} is not supported; allowed: "
                f"{needed}, the size of a head"
            )
    window, context = f"{arch}.attention.sliding_window", file.count(f"{arch}.context_length")
    if 0 < file.count(window, 0) < context:
        raise ModelError(
            f"{file.path}: metadata {window}={file.metadata[window]} is not supported; allowed: 0, "
            f"or at least the context of {context} tokens"
        )
    for name, allowed in _NEUTRAL.items():
        value = file.metadata.get(f"{arch}.{name}")
        if value is not None and value not in allowed:
            words = " or ".join(map(str, allowed))
            raise ModelError(
                f"{file.path}: metadata {arch}.{name}={str(value)[:100]} is not supported; "
                f"allowed: {words}"
            )


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
    scaling = f"{arch}.rope.scaling"
    factor = file.number(f"{scaling}.factor", file.number(f"{arch}.rope.scale_linear", 0.0))
    kind = file.text(f"{scaling}.type", "linear" if factor else "none")
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return parameters
    parameters |= {"rope_type": kind, "factor": factor}
    original = f"{scaling}.original_context_length"
    if original in file.metadata:
        parameters["original_max_position_embeddings"] = file.count(original)
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow"):
            if f"{scaling}.yarn_{name}" in file.metadata:
                parameters[name] = file.number(f"{scaling}.yarn_{name}")
        weight = file.number(f"{scaling}.attn_factor", 1.0)
        weight *= file.number(f"{scaling}.yarn_attn_factor", 1.0)
        if weight != 1.0 and factor > 1:
            parameters["attention_factor"] = weight * (0.1 * math.log(factor) + 1.0)
    return parameters


def _rope_factors(file: GGUFFile) -> list[float] | None:
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.quantization != GGMLQuantizationType.F32:
        raise ModelError(f"{file.path}: tensor {ROPE_FACTORS} must be F32")
    if len(tensor.shape) != 1 or tensor.shape[0] > _MAX_ROPE_FACTORS:
        raise ModelError(
            f"{file.path}: tensor {ROPE_FACTORS} has shape {tensor.shape}; needed: a vector of up "
            f"to {_MAX_ROPE_FACTORS}"
        )
    with open(open_plain(file.path), "rb") as opened:
        opened.seek(tensor.start)
        raw = opened.read(tensor.num_bytes)
    return list(struct.unpack(f"<{tensor.shape[0]}f", raw))


def _dtype(file: GGUFFile) -> str:
    """What the weights were before they were quantised, as far as one can tell."""
    kinds = {tensor.quantization for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if kinds == {GGMLQuantizationType.F32}:
        return "float32"
    return "float16" if kinds == {GGMLQuantizationType.F16} else "bfloat16"
