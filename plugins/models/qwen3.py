"""The dense Qwen families: Qwen2 (biases on q, k, v) and Qwen3 (normalised heads).

Source: transformers' `modeling_qwen2.py` and `modeling_qwen3.py`. Does not import torch until a
model is built.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.layers.basic.config_keys import ConfigKeys
from core.layers.basic.config_reader import ConfigReader
from core.layers.decoder.decoder_config import (
    parse_decoder,
    parse_grouped_query,
    refuse_qwen_windows,
)
from core.layers.decoder.decoder_family import DecoderFamily
from core.layers.decoder.decoder_spec import DecoderSpec
from core.plugin.hookspecs import NoOptions, Registration, hookimpl

_WINDOWS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})
_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
QWEN3_KEYS = ConfigKeys(
    model_type="qwen3", read=_WINDOWS | {"attention_bias"}, defaults=_DEFAULTS | {"head_dim": 128}
)
QWEN2_KEYS = ConfigKeys(model_type="qwen2", read=_WINDOWS, defaults=_DEFAULTS)


class Qwen3Family(DecoderFamily):
    """Qwen3 dense models."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a Qwen3 config.json."""
        hf_config = QWEN3_KEYS.complete(hf_config)
        refuse_qwen_windows(hf_config)
        attention_bias = ConfigReader(hf_config).flag("attention_bias", False)
        return parse_decoder(
            hf_config,
            architecture="Qwen3ForCausalLM",
            keys=QWEN3_KEYS,
            attention=parse_grouped_query(
                hf_config,
                qkv_bias=attention_bias,
                output_bias=attention_bias,
                qk_norm=True,
                default_head_dim=128,  # unlike elsewhere, not hidden_size / heads
            ),
        )


class Qwen2Family(DecoderFamily):
    """Qwen2 and Qwen2.5 dense models."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a Qwen2 config.json."""
        hf_config = QWEN2_KEYS.complete(hf_config)
        refuse_qwen_windows(hf_config)
        return parse_decoder(
            hf_config,
            architecture="Qwen2ForCausalLM",
            keys=QWEN2_KEYS,
            attention=parse_grouped_query(hf_config, qkv_bias=True, output_bias=False),
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
