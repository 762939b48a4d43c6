"""What config.json files of all decoder families say alike. A model plugin reads what is special
about its family and calls these for the rest. Knows nothing of torch.
"""

from collections.abc import Mapping
from typing import Any

from core.errors import ModelError
from core.interfaces.model import BlockQuantization, MoESpec
from core.layers.config_reader import ConfigReader
from core.layers.decoder_spec import AttentionSizes, DecoderSpec, DenseMLPSpec, GroupedQuerySizes
from core.layers.mla_spec import LatentAttentionSizes
from core.layers.moe_spec import MoELayerSpec, Routing
from core.layers.rope_spec import parse_rope

DTYPES = ("float32", "bfloat16", "float16")
FP8_BLOCK = 128  # rows and columns of a block that has one scale


def parse_grouped_query(
    hf_config: Mapping[str, Any],
    *,
    qkv_bias: bool,
    output_bias: bool,
    qk_norm: bool = False,
    default_head_dim: int | None = None,
) -> GroupedQuerySizes:
    """Read the sizes of grouped-query attention. `default_head_dim`: of configs without one; None
    means hidden_size / heads."""
    config = ConfigReader(hf_config)
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads != 0:
        raise ModelError(
            f"config.json: num_key_value_heads={num_kv_heads} must divide "
            f"num_attention_heads={num_heads}"
        )
    return GroupedQuerySizes(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.size("head_dim", default_head_dim or hidden_size // num_heads),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=qk_norm,
    )


def parse_decoder(
    hf_config: Mapping[str, Any],
    *,
    architecture: str,
    attention: AttentionSizes,
    mlp_bias: bool = False,
    experts: MoELayerSpec | None = None,
    expert_layers: tuple[int, ...] = (),
    ignored_tensors: tuple[str, ...] = (),
) -> DecoderSpec:
    """Read what every decoder family has, around its attention and experts. `experts` are those
    of `expert_layers`. Raises ModelError for what is not supported."""
    config = ConfigReader(hf_config)
    _refuse_windowed_layers(hf_config)
    config.choice("hidden_act", ("silu",), "silu")
    if isinstance(attention, LatentAttentionSizes):
        num_kv_heads, head_dim = attention.num_heads, attention.qk_head_dim
    else:
        num_kv_heads, head_dim = attention.num_kv_heads, attention.head_dim
    dtype_key = "dtype" if hf_config.get("dtype") is not None else "torch_dtype"
    hidden_size = config.size("hidden_size")
    intermediate_size = config.size("intermediate_size")
    moe = None
    if experts is not None and expert_layers:
        moe = MoESpec(
            num_experts=experts.num_experts,
            top_k=experts.top_k,
            intermediate_size=experts.expert_intermediate_size,
            layers=expert_layers,
            num_groups=experts.routing.num_groups,
        )
    spec = DecoderSpec(
        architecture=architecture,
        num_layers=config.size("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=attention.num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        vocab_size=config.size("vocab_size"),
        max_position_embeddings=config.size("max_position_embeddings"),
        dtype=config.choice(dtype_key, DTYPES, "float32"),
        moe=moe,
        quantization=parse_quantization(hf_config),
        latent_attention=isinstance(attention, LatentAttentionSizes),
        ignored_tensors=ignored_tensors,
        rope=parse_rope(hf_config),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        attention=attention,
        dense_mlp=DenseMLPSpec(
            hidden_size=hidden_size, intermediate_size=intermediate_size, bias=mlp_bias
        ),
        experts=experts if expert_layers else None,
    )
    _check_rope(spec)
    return spec


def check_routing(routing: Routing, num_experts: int) -> None:
    """Raise ModelError where so many experts or groups can't be chosen from what there is."""
    groups, chosen = routing.num_groups, routing.num_chosen_groups
    if num_experts % groups != 0:
        raise ModelError(f"config.json: n_group={groups} must divide the {num_experts} experts")
    if chosen > groups:
        raise ModelError(f"config.json: topk_group={chosen} must be at most n_group={groups}")
    group_size = num_experts // groups
    if routing.top_k > chosen * group_size:
        raise ModelError(
            f"config.json: num_experts_per_tok={routing.top_k} must be at most the "
            f"{chosen * group_size} experts that are chosen from"
        )
    if routing.group_top > group_size:
        raise ModelError(
            f"config.json: n_group={groups} leaves {group_size} of {num_experts} experts in a "
            f"group; needed: {routing.group_top} or more"
        )


def parse_quantization(hf_config: Mapping[str, Any]) -> BlockQuantization | None:
    """How weights are stored, where a config says that they are quantised."""
    raw = hf_config.get("quantization_config")
    if not raw:
        return None
    if not isinstance(raw, Mapping):
        raise ModelError(f"config.json: quantization_config={raw!r} must be an object or null")
    blocks = [FP8_BLOCK, FP8_BLOCK]
    for key, allowed, default in (
        ("quant_method", ("fp8",), None),
        ("fmt", ("e4m3",), "e4m3"),
        ("activation_scheme", ("dynamic",), "dynamic"),
        ("weight_block_size", (blocks,), None),
    ):
        value = raw.get(key, default)
        if (list(value) if isinstance(value, tuple) else value) not in allowed:
            raise ModelError(
                f"config.json: quantization_config.{key}={value!r} is not supported; allowed: "
                f"{allowed[0]} (fp8 weights in blocks of {FP8_BLOCK} x {FP8_BLOCK}), checkpoints "
                "without quantization_config, or a .gguf file"
            )
    return BlockQuantization(rows=FP8_BLOCK, columns=FP8_BLOCK)


def refuse_sliding_window(hf_config: Mapping[str, Any], *, default_on: bool) -> None:
    """Raise ModelError where a config asks for windowed attention, which no backend has.

    `default_on`: whether a `sliding_window` counts without `use_sliding_window`.
    """
    window = hf_config.get("sliding_window")
    if window is not None and hf_config.get("use_sliding_window", default_on):
        raise ModelError(f"config.json: sliding_window={window!r} is not supported; allowed: null")


def _refuse_windowed_layers(hf_config: Mapping[str, Any]) -> None:
    for layer_type in hf_config.get("layer_types") or []:
        if layer_type != "full_attention":
            raise ModelError(
                f"config.json: layer_types has {layer_type!r}, which is not supported; "
                "allowed: 'full_attention'"
            )


def _check_rope(spec: DecoderSpec) -> None:
    dim = spec.rope_dim
    if dim % 2 != 0:
        name = "qk_rope_head_dim" if spec.latent_attention else "head_dim"
        raise ModelError(f"config.json: {name}={dim} must be even (rotary embedding)")
    factors = spec.rope.frequency_factors
    if factors and len(factors) != dim // 2:
        raise ModelError(
            f"config.json: {len(factors)} rope factors for a head_dim of {dim}; needed: {dim // 2}"
        )
