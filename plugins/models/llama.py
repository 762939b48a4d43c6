"""The Llama family, and Mistral where it is the same: RMSNorm, GQA, RoPE, gated SiLU MLP.

Source: transformers' `modeling_llama.py` and `modeling_mistral.py`. Does not import torch until a
model is built.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import ModelError
from core.hookspecs import NoOptions, Registration, hookimpl
from core.layers.config_reader import ConfigReader
from core.layers.decoder_config import parse_decoder, parse_grouped_query, refuse_sliding_window
from core.layers.decoder_family import DecoderFamily
from core.layers.decoder_spec import DecoderSpec


class LlamaFamily(DecoderFamily):
    """Llama 1 to 3.3 and what shares its architecture (SmolLM2, ...)."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a Llama config.json."""
        config = ConfigReader(hf_config)
        attention_bias = config.flag("attention_bias", False)
        return parse_decoder(
            hf_config,
            architecture="LlamaForCausalLM",
            attention=parse_grouped_query(
                hf_config, qkv_bias=attention_bias, output_bias=attention_bias
            ),
            mlp_bias=config.flag("mlp_bias", False),
        )


class MistralFamily(LlamaFamily):
    """Mistral without sliding-window attention: Llama without biases."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a Mistral config.json."""
        refuse_sliding_window(hf_config, default_on=True)
        if "sliding_window" not in hf_config:
            raise ModelError(
                "config.json: sliding_window is missing, which means 4096 to this family and is "
                "not supported; allowed: null"
            )
        return parse_decoder(
            hf_config,
            architecture="MistralForCausalLM",
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
            summary="Mistral without sliding-window attention",
        ),
    ]
