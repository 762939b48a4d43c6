"""The GLM-4.5 family: heads of which half turns, sigmoid routing with a correction bias, shared
experts.

Source: transformers' `modeling_glm4_moe.py`. Does not import torch until a model is built.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.layers.basic.config_keys import ConfigKeys
from core.layers.basic.config_reader import MAX_LAYERS, ConfigReader
from core.layers.decoder.decoder_config import (
    check_routing,
    parse_decoder,
    parse_grouped_query,
    refuse_windowed_layers,
)
from core.layers.decoder.decoder_family import DecoderFamily
from core.layers.decoder.decoder_spec import DecoderSpec
from core.layers.experts.moe_spec import MoELayerSpec, Routing
from core.plugin.hookspecs import NoOptions, Registration, hookimpl

KEYS = ConfigKeys(
    model_type="glm4_moe",
    read=frozenset(
        {
            "attention_bias", "first_k_dense_replace", "moe_intermediate_size", "n_group",
            "n_routed_experts", "n_shared_experts", "norm_topk_prob", "num_experts_per_tok",
            "num_nextn_predict_layers", "routed_scaling_factor", "topk_group", "use_qk_norm",
        }
    ),
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
    },
    aliases={
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
    ignored={"output_router_logits": "only training reads it"},
    # Nobody chooses otherwise in this family; who does would get other tokens.
    neutral={"scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc")},
)  # fmt: skip


class Glm4MoeFamily(DecoderFamily):
    """GLM-4.5, GLM-4.5-Air, GLM-4.6 and what shares their architecture."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a GLM-4.5 config.json."""
        hf_config = KEYS.complete(hf_config)
        refuse_windowed_layers(hf_config)
        config = ConfigReader(hf_config)
        num_layers = config.num_layers()
        # Layers for drafting tokens, behind those that are run.
        num_drafts = config.count("num_nextn_predict_layers", at_most=MAX_LAYERS)
        drafts = range(num_layers, num_layers + num_drafts)
        return parse_decoder(
            hf_config,
            architecture="Glm4MoeForCausalLM",
            keys=KEYS,
            attention=parse_grouped_query(
                hf_config,
                qkv_bias=config.flag("attention_bias", False),
                output_bias=False,
                qk_norm=config.flag("use_qk_norm", False),
            ),
            partial_rotary=True,
            experts=_experts(config),
            expert_layers=tuple(range(config.count("first_k_dense_replace"), num_layers)),
            ignored_tensors=tuple(f"model.layers.{index}." for index in drafts),
        )


def _experts(config: ConfigReader) -> MoELayerSpec:
    routing = Routing(
        top_k=config.size("num_experts_per_tok"),
        scoring="sigmoid",
        normalise=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 1.0),
        num_groups=config.size("n_group"),
        num_chosen_groups=config.size("topk_group"),
        group_top=2,
    )
    num_experts, size = config.num_experts("n_routed_experts"), config.size("moe_intermediate_size")
    check_routing(routing, num_experts)
    return MoELayerSpec(
        hidden_size=config.size("hidden_size"),
        num_experts=num_experts,
        expert_intermediate_size=size,
        routing=routing,
        has_bias=True,
        shared_intermediate_size=config.count("n_shared_experts", 0) * size or None,
    )


def family(options: NoOptions) -> Glm4MoeFamily:
    """Factory of "Glm4MoeForCausalLM"."""
    return Glm4MoeFamily()


@hookimpl
def register_model() -> Sequence[Registration]:
    """The family of this module."""
    return [
        Registration(
            name="Glm4MoeForCausalLM",
            factory="plugins.models.glm4_moe:family",
            summary="GLM-4.5 and GLM-4.6",
        ),
    ]
