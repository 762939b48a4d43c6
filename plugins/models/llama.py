"""The Llama family, and Mistral where it is the same: RMSNorm, GQA, RoPE, gated SiLU MLP.

Source: transformers' `modeling_llama.py` and `modeling_mistral.py`. Does not import torch until a
model is built.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.layers.basic.config_keys import ConfigKeys
from core.layers.basic.config_reader import ConfigReader
from core.layers.decoder.decoder_config import (
    parse_decoder,
    parse_grouped_query,
    refuse_sliding_window,
    refuse_windowed_layers,
)
from core.layers.decoder.decoder_family import DecoderFamily
from core.layers.decoder.decoder_spec import DecoderSpec
from core.plugin.hookspecs import NoOptions, Registration, hookimpl

LLAMA_KEYS = ConfigKeys(model_type="llama", read=frozenset({"attention_bias", "mlp_bias"}))
MISTRAL_KEYS = ConfigKeys(
    model_type="mistral",
    read=frozenset({"sliding_window"}),
    defaults={"sliding_window": 4096, "num_key_value_heads": 8},
)


class LlamaFamily(DecoderFamily):
    """Llama 1 to 3.3 and what shares its architecture (SmolLM2, ...)."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a Llama config.json."""
        hf_config = LLAMA_KEYS.complete(hf_config)
        refuse_windowed_layers(hf_config)
        config = ConfigReader(hf_config)
        attention_bias = config.flag("attention_bias", False)
        return parse_decoder(
            hf_config,
            architecture="LlamaForCausalLM",
            keys=LLAMA_KEYS,
            attention=parse_grouped_query(
                hf_config, qkv_bias=attention_bias, output_bias=attention_bias
            ),
            mlp_bias=config.flag("mlp_bias", False),
        )


class MistralFamily(LlamaFamily):
    """Mistral where its window holds the whole context: Llama without biases."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a Mistral config.json."""
        hf_config = MISTRAL_KEYS.complete(hf_config)
        refuse_windowed_layers(hf_config)
        refuse_sliding_window(hf_config)
        return parse_decoder(
            hf_config,
            architecture="MistralForCausalLM",
            keys=MISTRAL_KEYS,
            attention=parse_grouped_query(hf_config, qkv_bias=False, output_bias=False),
        )


def family(options: NoOptions) -> LlamaFamily:
    """Factory of "LlamaForCausalLM"."""
    return LlamaFamily()


def mistral_family(options: NoOptions) -> MistralFamily:
    """Factory of "MistralForCausalLM"."""
    return MistralFamily()


@hookimpl
def register_model() -> Sequence[Registration]:
    """Both families of this module."""
    return [
        Registration(
            name="LlamaForCausalLM",
            factory="plugins.models.llama:family",
            summary="Llama 1 to 3.3, SmolLM2",
        ),
        Registration(
            name="MistralForCausalLM",
            factory="plugins.models.llama:mistral_family",
            summary="Mistral where the window holds the context",
        ),
    ]
