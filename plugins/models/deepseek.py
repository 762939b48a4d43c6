"""The DeepSeek families with latent attention: V2 and V2-Lite (softmax routing), V3 and R1 (sigmoid
routing with a correction bias, fp8 weights).

Source: transformers' `modeling_deepseek_v2.py` and `modeling_deepseek_v3.py`, and the code that
DeepSeek publishes with its checkpoints. Does not import torch until a model is built.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from core.errors import ModelKeyError
from core.layers.attention.mla_spec import LatentAttentionSizes, latent_scale
from core.layers.attention.rope_spec import parse_rope
from core.layers.basic.config_keys import ConfigKeys
from core.layers.basic.config_reader import MAX_LAYERS, ConfigReader
from core.layers.decoder.decoder_config import check_routing, parse_decoder, refuse_windowed_layers
from core.layers.decoder.decoder_family import DecoderFamily
from core.layers.decoder.decoder_spec import DecoderSpec
from core.layers.experts.moe_spec import MoELayerSpec, Routing
from core.plugin.hookspecs import NoOptions, Registration, hookimpl

ROPE_KINDS = ("default", "yarn")
_READ = frozenset(
    {
        "attention_bias", "first_k_dense_replace", "kv_lora_rank", "moe_intermediate_size",
        "moe_layer_freq", "n_group", "n_routed_experts", "n_shared_experts", "norm_topk_prob",
        "num_experts_per_tok", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
        "routed_scaling_factor", "scoring_func", "topk_group", "topk_method", "v_head_dim",
    }
)  # fmt: skip
_TRAINING = "only training reads it"
_IGNORED = {
    "output_router_logits": _TRAINING,
    "aux_loss_alpha": _TRAINING,
    "seq_aux": _TRAINING,
    "router_aux_loss_coef": _TRAINING,
    "ep_size": "parallel.ep says how experts are spread",
    "num_key_value_heads": "all heads share one latent",
    "head_dim": "qk_nope_head_dim, qk_rope_head_dim and v_head_dim say it",
    "qk_head_dim": "the sum of qk_nope_head_dim and qk_rope_head_dim",
    "auto_map": "code of a checkpoint is not run; the family's is built in",
}
V3_KEYS = ConfigKeys(
    model_type="deepseek_v3",
    read=_READ | {"num_nextn_predict_layers", "rope_interleave"},
    defaults={
        "q_lora_rank": 1536,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    },
    aliases={
        "num_experts": "n_routed_experts",
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
    ignored=_IGNORED,
)
V2_KEYS = ConfigKeys(
    model_type="deepseek_v2",
    read=_READ | {"mlp_bias"},
    defaults={"q_lora_rank": 1536, "n_shared_experts": 2},
    aliases={"num_experts": "n_routed_experts"},
    ignored=_IGNORED,
)


class DeepseekV3Family(DecoderFamily):
    """DeepSeek-V3, V3-0324, R1 and what shares their architecture."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a DeepSeek-V3 config.json."""
        hf_config = V3_KEYS.complete(hf_config)
        config = ConfigReader(hf_config)
        config.choice("scoring_func", ("sigmoid",), "sigmoid")
        config.choice("topk_method", ("noaux_tc",), "noaux_tc")
        num_layers = config.num_layers()
        routing = Routing(
            top_k=config.size("num_experts_per_tok"),
            scoring="sigmoid",
            normalise=config.flag("norm_topk_prob", True),
            scale=config.number("routed_scaling_factor", 2.5),
            num_groups=config.size("n_group"),
            num_chosen_groups=config.size("topk_group"),
            group_top=2,
        )
        # Layers for drafting tokens, behind those that are run.
        num_drafts = config.count("num_nextn_predict_layers", at_most=MAX_LAYERS)
        drafts = range(num_layers, num_layers + num_drafts)
        return parse_decoder(
            hf_config,
            architecture="DeepseekV3ForCausalLM",
            keys=V3_KEYS,
            attention=_attention(hf_config, interleaved=config.flag("rope_interleave", True)),
            experts=_experts(hf_config, routing, has_bias=True),
            expert_layers=_expert_layers(config, default_first=3),
            ignored_tensors=tuple(f"model.layers.{index}." for index in drafts),
        )


class DeepseekV2Family(DecoderFamily):
    """DeepSeek-V2, V2.5 and V2-Lite."""

    def parse(self, hf_config: Mapping[str, Any]) -> DecoderSpec:
        """Read a DeepSeek-V2 config.json."""
        hf_config = V2_KEYS.complete(hf_config)
        config = ConfigReader(hf_config)
        config.choice("scoring_func", ("softmax",), "softmax")
        method = config.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy")
        if config.flag("norm_topk_prob", False):
            raise config.error("norm_topk_prob", True, "false")
        if config.flag("mlp_bias", False):
            raise config.error("mlp_bias", True, "false")
        is_grouped = method == "group_limited_greedy"
        routing = Routing(
            top_k=config.size("num_experts_per_tok"),
            scoring="softmax",
            normalise=False,
            scale=config.number("routed_scaling_factor", 1.0),
            num_groups=config.size("n_group") if is_grouped else 1,
            num_chosen_groups=config.size("topk_group") if is_grouped else 1,
        )
        return parse_decoder(
            hf_config,
            architecture="DeepseekV2ForCausalLM",
            keys=V2_KEYS,
            attention=_attention(hf_config, interleaved=True),
            experts=_experts(hf_config, routing, has_bias=False),
            expert_layers=_expert_layers(config, default_first=0),
        )


def _attention(hf_config: Mapping[str, Any], *, interleaved: bool) -> LatentAttentionSizes:
    config = ConfigReader(hf_config)
    refuse_windowed_layers(hf_config)
    rope = parse_rope(hf_config)
    if rope.kind not in ROPE_KINDS:
        raise ModelKeyError(
            "rope_scaling",
            f": rope type {rope.kind!r} is not supported with latent attention; allowed: "
            + ", ".join(ROPE_KINDS),
        )
    nope_dim, rope_dim = config.size("qk_nope_head_dim"), config.size("qk_rope_head_dim")
    return LatentAttentionSizes(
        hidden_size=config.size("hidden_size"),
        num_heads=config.size("num_attention_heads"),
        q_lora_rank=config.optional_size("q_lora_rank"),
        kv_lora_rank=config.size("kv_lora_rank"),
        qk_nope_head_dim=nope_dim,
        qk_rope_head_dim=rope_dim,
        v_head_dim=config.size("v_head_dim"),
        scale=latent_scale(nope_dim + rope_dim, rope),
        rope_interleaved=interleaved,
        attention_bias=config.flag("attention_bias", False),
    )


def _experts(hf_config: Mapping[str, Any], routing: Routing, *, has_bias: bool) -> MoELayerSpec:
    config = ConfigReader(hf_config)
    num_experts, size = config.num_experts("n_routed_experts"), config.size("moe_intermediate_size")
    check_routing(routing, num_experts)
    num_shared = config.count("n_shared_experts", 0)
    return MoELayerSpec(
        hidden_size=config.size("hidden_size"),
        num_experts=num_experts,
        expert_intermediate_size=size,
        routing=routing,
        has_bias=has_bias,
        shared_intermediate_size=num_shared * size or None,
    )


def _expert_layers(config: ConfigReader, *, default_first: int) -> tuple[int, ...]:
    """The first layers are dense, then each, or each n-th by its index, has experts."""
    every = config.size("moe_layer_freq", 1)
    first = config.count("first_k_dense_replace", default_first)
    return tuple(i for i in range(first, config.num_layers()) if i % every == 0)


def v3_family(options: NoOptions) -> DeepseekV3Family:
    """Factory of "DeepseekV3ForCausalLM"."""
    return DeepseekV3Family()


def v2_family(options: NoOptions) -> DeepseekV2Family:
    """Factory of "DeepseekV2ForCausalLM"."""
    return DeepseekV2Family()


@hookimpl
def register_model() -> Sequence[Registration]:
    """Both families of this module."""
    return [
        Registration(
            name="DeepseekV3ForCausalLM",
            factory="plugins.models.deepseek:v3_family",
            summary="DeepSeek-V3 and R1",
        ),
        Registration(
            name="DeepseekV2ForCausalLM",
            factory="plugins.models.deepseek:v2_family",
            summary="DeepSeek-V2 and V2-Lite",
        ),
    ]
