"""The Qwen3 family with experts: Qwen3's attention, softmax routing, no shared experts.

Source: transformers' `modeling_qwen3_moe.py`. Does not import torch until a model is built.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.layers.basic.config_keys import ConfigKeys
from core.layers.basic.config_reader import ConfigReader
from core.layers.decoder.decoder_config import (
    check_routing,
    parse_decoder,
    parse_grouped_query,
    refuse_sliding_window,
    refuse_windowed_layers,
)
from core.layers.decoder.decoder_family import DecoderFamily
from core.layers.decoder.decoder_spec import DecoderSpec
from core.layers.experts.moe_spec import MoELayerSpec, Routing
from core.plugin.hookspecs import NoOptions, Registration, hookimpl

_TRAINING = "only training reads it"
KEYS = ConfigKeys(
    model_type="qwen3_moe",
    read=frozenset(
        {
            "attention_bias", "use_sliding_window", "sliding_window", "decoder_sparse_step",
            "moe_intermediate_size", "num_experts_per_tok", "num_experts", "norm_topk_prob",
            "mlp_only_layers",
        }
    ),
    defaults={
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
    aliases={"num_local_experts": "num_experts"},
    ignored={
        "output_router_logits": _TRAINING,
        "router_aux_loss_coef": _TRAINING,
        "max_window_layers": "all layers of this family have a window, or none",
    },
)  # fmt: skip


class Qwen3MoeFamily(DecoderFamily):
    """Qwen3-30B-A3B, Qwen3-235B-A22B and what shares their architecture."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a Qwen3-MoE config.json."""
        hf_config = KEYS.complete(hf_config)
        config = ConfigReader(hf_config)
        refuse_windowed_layers(hf_config)
        if config.flag("use_sliding_window", False):
            refuse_sliding_window(hf_config)
        attention_bias = config.flag("attention_bias", False)
        routing = Routing(
            top_k=config.size("num_experts_per_tok"),
            scoring="softmax",
            normalise=config.flag("norm_topk_prob", False),
        )
        num_experts = config.num_experts("num_experts")
        check_routing(routing, num_experts)
        return parse_decoder(
            hf_config,
            architecture="Qwen3MoeForCausalLM",
            keys=KEYS,
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
    num_layers = config.num_layers()
    every = config.size("decoder_sparse_step")
    dense = frozenset(config.indices("mlp_only_layers", num_layers))
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
