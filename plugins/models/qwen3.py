"""The dense Qwen families: Qwen2 (biases on q, k, v) and Qwen3 (normalised heads).

Source: transformers' `modeling_qwen2.py` and `modeling_qwen3.py`. Does not import torch until a
model is built.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.hookspecs import NoOptions, Registration, hookimpl
from core.layers.decoder_spec import (
    ConfigReader,
    DecoderSpec,
    parse_decoder,
    refuse_sliding_window,
)
from core.layers.dense_family import DenseFamily


class Qwen3Family(DenseFamily):
    """Qwen3 dense models."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a Qwen3 config.json."""
        refuse_sliding_window(hf_config, default_on=False)
        config = ConfigReader(hf_config)
        attention_bias = config.flag("attention_bias", False)
        return parse_decoder(
            # Unlike elsewhere, a missing head_dim does not mean hidden_size / heads.
            {**hf_config, "head_dim": config.size("head_dim", 128)},
            architecture="Qwen3ForCausalLM",
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            qk_norm=True,
        )


class Qwen2Family(DenseFamily):
    """Qwen2 and Qwen2.5 dense models."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a Qwen2 config.json."""
        refuse_sliding_window(hf_config, default_on=False)
        return parse_decoder(
            hf_config, architecture="Qwen2ForCausalLM", qkv_bias=True, output_bias=False
        )


def family(options: NoOptions) -> Qwen3Family:
    """Factory of "Qwen3ForCausalLM"."""
    return Qwen3Family()


def qwen2_family(options: NoOptions) -> Qwen2Family:
    """Factory of "Qwen2ForCausalLM"."""
    return Qwen2Family()


@hookimpl
def register_model() -> Sequence[Registration]:
    """Both families of this module."""
    return [
        Registration(
            name="Qwen3ForCausalLM",
            factory="plugins.models.qwen3:family",
            summary="Qwen3 dense",
        ),
        Registration(
            name="Qwen2ForCausalLM",
            factory="plugins.models.qwen3:qwen2_family",
            summary="Qwen2 and Qwen2.5 dense",
        ),
    ]
