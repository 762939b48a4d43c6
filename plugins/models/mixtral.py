"""The Mixtral family: Mistral's attention, and experts in every layer.

Source: transformers' `modeling_mixtral.py`. Does not import torch until a model is built.
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
from core.layers.experts.moe_spec import MIXTRAL_NAMES, MoELayerSpec, Routing
from core.plugin.hookspecs import NoOptions, Registration, hookimpl

_TRAINING = "only training reads it"
KEYS = ConfigKeys(
    model_type="mixtral",
    read=frozenset({"num_experts_per_tok", "num_local_experts", "sliding_window"}),
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    aliases={"num_experts": "num_local_experts"},
    ignored=dict.fromkeys(
        ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"), _TRAINING
    ),
)


class MixtralFamily(DecoderFamily):
    """Mixtral 8x7B and 8x22B."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a Mixtral config.json."""
        hf_config = KEYS.complete(hf_config)
        refuse_windowed_layers(hf_config)
        refuse_sliding_window(hf_config)
        config = ConfigReader(hf_config)
        routing = Routing(
            top_k=config.size("num_experts_per_tok"), scoring="softmax", normalise=True
        )
        num_experts = config.num_experts("num_local_experts")
        check_routing(routing, num_experts)
        return parse_decoder(
            hf_config,
            architecture="MixtralForCausalLM",
            keys=KEYS,
            attention=parse_grouped_query(hf_config, qkv_bias=False, output_bias=False),
            experts=MoELayerSpec(
                hidden_size=config.size("hidden_size"),
                num_experts=num_experts,
                expert_intermediate_size=config.size("intermediate_size"),
                routing=routing,
                block="block_sparse_moe",
                names=MIXTRAL_NAMES,
            ),
            expert_layers=tuple(range(config.num_layers())),
        )


def family(options: NoOptions) -> MixtralFamily:
    """Factory of "MixtralForCausalLM"."""
    return MixtralFamily()


@hookimpl
def register_model() -> Sequence[Registration]:
    """The family of this module."""
    return [
        Registration(
            name="MixtralForCausalLM",
            factory="plugins.models.mixtral:family",
            summary="Mixtral",
        ),
    ]
