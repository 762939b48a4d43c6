"""Sizes and variants of decoder-only transformers, read from a config.json.

Model plugins say what is special about their family; what all share is checked here. Knows
nothing of torch, so that a launcher can read it cheaply.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ModelError
from core.interfaces.model import ModelSpec
from core.layers.rope_spec import RopeSpec, parse_rope

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec(ModelSpec):
    """A dense decoder: pre-norm, grouped-query attention with RoPE, gated SiLU MLP."""

    rope: RopeSpec
    norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool  # RMSNorm of each query and key head before RoPE


class ConfigReader:
    """Typed reads of a config.json, with errors that name key, value and what is allowed."""

    def __init__(self, hf_config: Mapping[str, Any]) -> None:
        self._config = hf_config

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self._config.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._error(key, value, "a whole number above 0")
        return value

    def number(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self._config.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self._error(key, value, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false; null means the default."""
        value = self._config.get(key)
        if value is None:
            value = default
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """One of `allowed`."""
        value = self._config.get(key)
        if value is None:
            value = default
        if value not in allowed:
            raise self._error(key, value, ", ".join(allowed))
        return str(value)

    def _error(self, key: str, value: object, allowed: str) -> ModelError:
        if value is None and key not in self._config:
            return ModelError(f"config.json: {key} is missing; needed: {allowed}")
        return ModelError(f"config.json: {key}={value!r} is not supported; allowed: {allowed}")


def parse_decoder(
    hf_config: Mapping[str, Any],
    *,
    architecture: str,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool = False,
    qk_norm: bool = False,
) -> DecoderSpec:
    """Read what every decoder family has. Raises ModelError for what is not supported."""
    config = ConfigReader(hf_config)
    _refuse_unsupported(hf_config)
    config.choice("hidden_act", ("silu",), "silu")
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads != 0:
        raise ModelError(
            f"config.json: num_key_value_heads={num_kv_heads} must divide "
            f"num_attention_heads={num_heads}"
        )
    head_dim = config.size("head_dim", hidden_size // num_heads)
    if head_dim % 2 != 0:
        raise ModelError(f"config.json: head_dim={head_dim} must be even (rotary embedding)")
    rope = parse_rope(hf_config)
    if rope.frequency_factors and len(rope.frequency_factors) != head_dim // 2:
        raise ModelError(
            f"config.json: {len(rope.frequency_factors)} rope factors for a head_dim of {head_dim};"
            f" needed: {head_dim // 2}"
        )
    dtype_key = "dtype" if hf_config.get("dtype") is not None else "torch_dtype"
    return DecoderSpec(
        architecture=architecture,
        num_layers=config.size("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.size("intermediate_size"),
        vocab_size=config.size("vocab_size"),
        max_position_embeddings=config.size("max_position_embeddings"),
        dtype=config.choice(dtype_key, DTYPES, "float32"),
        rope=rope,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def _refuse_unsupported(hf_config: Mapping[str, Any]) -> None:
    quantization = hf_config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise ModelError(
            f"config.json: quantization_config.quant_method={method!r} is not supported; allowed: "
            "checkpoints without quantization_config, or a .gguf file"
        )
    layer_types = hf_config.get("layer_types") or []
    for layer_type in layer_types:
        if layer_type != "full_attention":
            raise ModelError(
                f"config.json: layer_types has {layer_type!r}, which is not supported; "
                "allowed: 'full_attention'"
            )


def refuse_sliding_window(hf_config: Mapping[str, Any], *, default_on: bool) -> None:
    """Raise ModelError where a config asks for windowed attention, which no backend has.

    `default_on`: whether a `sliding_window` counts without `use_sliding_window`.
    """
    window = hf_config.get("sliding_window")
    if window is not None and hf_config.get("use_sliding_window", default_on):
        raise ModelError(f"config.json: sliding_window={window!r} is not supported; allowed: null")
