"""GGUF files written by the gguf library: a whole tiny model, out of a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import MODEL_ARCH
from gguf.quants import quantize
from gguf.tensor_mapping import get_tensor_name_map
from safetensors.torch import load_file

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"} | {
    "Qwen3ForCausalLM": "qwen3"
}


def permute_heads(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of rows for q and k (its convert_hf_to_gguf.py, LlamaModel.permute)."""
    split = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    folder: Path,
    path: Path,
    matrices: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """The weights and sizes of a folder as llama.cpp's converter would store them."""
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["architectures"][0]]
    names = get_tensor_name_map(MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    writer = GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_byte_vocabulary(writer, config["vocab_size"])
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, _value_type(value))
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.to(torch.float32).numpy()
        if arch == "llama" and ".q_proj." in name:
            values = permute_heads(values, config["num_attention_heads"])
        if arch == "llama" and ".k_proj." in name:
            values = permute_heads(values, config["num_key_value_heads"])
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        kind = matrices if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(gguf_name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_vocabulary(writer: GGUFWriter, vocab_size: int) -> None:
    """A token for each byte, then control tokens, and one that is merged."""
    from core.model_files.tokenizer_json import byte_alphabet

    controls = [f"<|control_{index}|>" for index in range(vocab_size - 257)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*byte_alphabet(), *controls, "th"])
    writer.add_token_types([1] * 256 + [3] * len(controls) + [1])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(256)


def _value_type(value: Any) -> Any:
    from gguf.constants import GGUFValueType

    return GGUFValueType.get_type(value)
