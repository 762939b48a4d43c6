"""The Qwen3 family with experts: Qwen3's attention, softmax routing, no shared experts.

Source: transformers' `modeling_qwen3_moe.py`. Does not import torch until a model is built.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.hookspecs import NoOptions, Registration, hookimpl
from core.layers.config_reader import ConfigReader
from core.layers.decoder_config import (
    check_routing,
    parse_decoder,
    parse_grouped_query,
    refuse_sliding_window,
)
from core.layers.decoder_family import DecoderFamily
from core.layers.decoder_spec import DecoderSpec
from core.layers.moe_spec import MoELayerSpec, Routing


class Qwen3MoeFamily(DecoderFamily):
    """Qwen3-30B-A3B, Qwen3-235B-A22B and what shares their architecture."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a Qwen3-MoE config.json."""
        refuse_sliding_window(hf_config, default_on=False)
        config = ConfigReader(hf_config)
        attention_bias = config.flag("attention_bias", False)
        routing = Routing(
            top_k=config.size("num_experts_per_tok", 8),
            scoring="softmax",
            normalise=config.flag("norm_topk_prob", False),
        )
        # transformers 5 writes the number of experts under its second name.
        key = "num_experts" if hf_config.get("num_experts") is not None else "num_local_experts"
        num_experts = config.size(key)
        check_routing(routing, num_experts)
        return parse_decoder(
            hf_config,
            architecture="Qwen3MoeForCausalLM",
            attention=parse_grouped_query(
                hf_config, qkv_bias=attention_bias, output_bias=attention_bias, qk_norm=True
            ),
            experts=MoELayerSpec(
                hidden_size=config.size("hidden_size"),
                num_experts=num_experts,
                expert_intermediate_size=config.size("moe_intermediate_size"),
                routing=routing,
            ),
            expert_layers=_expert_layers(config),
        )


def _expert_layers(config: ConfigReader) -> tuple[int, ...]:
    """Each n-th layer has experts, but those that are named as dense."""
    num_layers = config.size("num_hidden_layers")
    every = config.size("decoder_sparse_step", 1)
    dense = config.indices("mlp_only_layers", num_layers)
    return tuple(i for i in range(num_layers) if i not in dense and (i + 1) % every == 0)


def family(options: NoOptions) -> Qwen3MoeFamily:
    """Factory of "Qwen3MoeForCausalLM"."""
    return Qwen3MoeFamily()


@hookimpl
def register_model() -> Sequence[Registration]:
    """The family of this module."""
    return [
        Registration(
            name="Qwen3MoeForCausalLM",
            factory="plugins.models.qwen3_moe:family",
            summary="Qwen3 with experts",
        ),
    ]
