"""What config.json files of all decoder families say alike. A model plugin reads what is special
about its family and calls these for the rest. Knows nothing of torch.
"""

from collections.abc import Mapping
from typing import Any

from core.errors import ModelKeyError
from core.interfaces.model import BlockQuantization, MoESpec
from core.layers.attention.gqa_spec import GroupedQuerySizes
from core.layers.attention.mla_spec import LatentAttentionSizes
from core.layers.attention.rope_spec import RopeSpec, extended_positions, parse_rope, rope_warnings
from core.layers.basic.config_keys import ConfigKeys
from core.layers.basic.config_reader import MAX_POSITIONS, ConfigReader, shown
from core.layers.decoder.decoder_spec import AttentionSizes, DecoderSpec, DenseMLPSpec
from core.layers.experts.moe_spec import MoELayerSpec, Routing

DTYPES = ("float32", "bfloat16", "float16")
FP8_BLOCK = 128  # rows and columns of a block that has one scale
_BLOCKS = [FP8_BLOCK, FP8_BLOCK]
# Key of a quantisation config -> what it may say, and what its absence means.
_QUANTIZATION: Mapping[str, tuple[tuple[object, ...], object]] = {
    "quant_method": (("fp8",), None),
    "fmt": (("e4m3",), "e4m3"),
    "activation_scheme": (("dynamic",), "dynamic"),
    "weight_block_size": ((_BLOCKS, tuple(_BLOCKS)), None),
    # How scales are stored: their dtype in the files decides, and both are widened to float32.
    "scale_fmt": (("float", "ue8m0"), "float"),
    "expert_dtype": (("fp8",), "fp8"),
}
QUANTIZATION_IGNORED: Mapping[str, str] = {
    "dequantize": "it chooses how transformers computes, not what",
    "modules_to_not_convert": "the dtype of each stored tensor says whether it is quantised",
    "ignored_layers": "the dtype of each stored tensor says whether it is quantised",
    "modules_to_convert": "the dtype of each stored tensor says whether it is quantised",
}


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
        raise ModelKeyError(
            "num_key_value_heads", f"={num_kv_heads} must divide num_attention_heads={num_heads}"
        )
    return GroupedQuerySizes(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.size("head_dim", default_head_dim or max(1, hidden_size // num_heads)),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=qk_norm,
    )


def parse_decoder(
    hf_config: Mapping[str, Any],
    *,
    architecture: str,
    keys: ConfigKeys,
    attention: AttentionSizes,
    mlp_bias: bool = False,
    partial_rotary: bool = False,
    experts: MoELayerSpec | None = None,
    expert_layers: tuple[int, ...] = (),
    ignored_tensors: tuple[str, ...] = (),
) -> DecoderSpec:
    """Read what every decoder family has, around its attention and experts. `experts` are those
    of `expert_layers`; `hf_config` is complete (see ConfigKeys). `partial_rotary`: the family knows
    heads of which only the first values turn. Raises ModelError for what is not supported."""
    config = ConfigReader(hf_config)
    rope = parse_rope(hf_config)
    if rope.fraction != 1 and not partial_rotary:
        raise config.error("partial_rotary_factor", rope.fraction, "1.0")
    config.choice("hidden_act", ("silu", "swish"), "silu")
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
        num_layers=config.num_layers(),
        hidden_size=hidden_size,
        num_heads=attention.num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        vocab_size=config.size("vocab_size"),
        max_position_embeddings=context_length(hf_config, rope),
        dtype=config.choice(dtype_key, DTYPES, "float32"),
        moe=moe,
        quantization=parse_quantization(hf_config),
        latent_attention=isinstance(attention, LatentAttentionSizes),
        ignored_tensors=ignored_tensors,
        warnings=tuple(_warnings(hf_config, keys)),
        rope=rope,
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


def context_length(hf_config: Mapping[str, Any], rope: RopeSpec | None = None) -> int:
    """The longest context, in tokens: what the positions reach."""
    max_positions = ConfigReader(hf_config).size("max_position_embeddings", at_most=MAX_POSITIONS)
    return extended_positions(rope or parse_rope(hf_config), max_positions)


def _warnings(hf_config: Mapping[str, Any], keys: ConfigKeys) -> list[str]:
    quantization = hf_config.get("quantization_config") or {}
    return [
        *keys.warnings(hf_config),
        *rope_warnings(hf_config),
        *quantization_warnings(quantization),
    ]


def check_routing(routing: Routing, num_experts: int) -> None:
    """Raise ModelError where so many experts or groups can't be chosen from what there is."""
    groups, chosen = routing.num_groups, routing.num_chosen_groups
    if num_experts % groups != 0:
        raise ModelKeyError("n_group", f"={groups} must divide the {num_experts} experts")
    if chosen > groups:
        raise ModelKeyError("topk_group", f"={chosen} must be at most n_group={groups}")
    group_size = num_experts // groups
    if routing.top_k > chosen * group_size:
        raise ModelKeyError(
            "num_experts_per_tok",
            f"={routing.top_k} must be at most the {chosen * group_size} experts that are chosen "
            "from",
        )
    if routing.group_top > group_size:
        raise ModelKeyError(
            "n_group",
            f"={groups} leaves {group_size} of {num_experts} experts in a group; needed: "
            f"{routing.group_top} or more",
        )


def parse_quantization(hf_config: Mapping[str, Any]) -> BlockQuantization | None:
    """How weights are stored, where a config says that they are quantised."""
    raw = hf_config.get("quantization_config")
    if not raw:
        return None
    if not isinstance(raw, Mapping):
        raise ModelKeyError("quantization_config", f"={shown(raw)} must be an object or null")
    for key, (allowed, default) in _QUANTIZATION.items():
        value = raw.get(key)
        value = default if value is None else value
        if value not in allowed:
            raise ModelKeyError(
                "quantization_config",
                f".{key}={shown(value)} is not supported; allowed: {allowed[0]} (fp8 weights in "
                f"blocks of {FP8_BLOCK} x {FP8_BLOCK}), checkpoints without quantization_config, "
                "or a .gguf file",
            )
    return BlockQuantization(rows=FP8_BLOCK, columns=FP8_BLOCK)


def quantization_warnings(raw: Mapping[str, Any]) -> list[str]:
    """Keys of a quantisation config that say something unknown."""
    known = _QUANTIZATION.keys() | QUANTIZATION_IGNORED.keys()
    unknown = sorted(key for key, value in raw.items() if key not in known and value is not None)
    if not unknown:
        return []
    return [
        "config.json: quantization_config has keys that are not known and are ignored: "
        + ", ".join(shown(key)[1:-1] for key in unknown[:10])
    ]


def refuse_sliding_window(hf_config: Mapping[str, Any], *, from_layer: int = 0) -> None:
    """Raise ModelError where a config asks for windowed attention, which no backend has, in a layer
    from `from_layer` on. A window that holds the whole context is none."""
    config = ConfigReader(hf_config)
    window = config.optional_size("sliding_window")
    context = context_length(hf_config)
    if window is None or window >= context or from_layer >= config.num_layers():
        return
    raise ModelKeyError(
        "sliding_window",
        f"={window} is not supported; allowed: null, or at least the context of {context} tokens: "
        f"with max_position_embeddings={window} in config.json the model is served, exactly, up to "
        "that length",
    )


def refuse_windowed_layers(hf_config: Mapping[str, Any]) -> None:
    """Raise ModelError where a config names a kind of layer other than full attention."""
    layer_types = hf_config.get("layer_types")
    if layer_types is None:
        return
    if not isinstance(layer_types, list):
        raise ModelKeyError("layer_types", f"={shown(layer_types)} must be a list or null")
    for layer_type in layer_types:
        if layer_type != "full_attention":
            raise ModelKeyError(
                "layer_types",
                f" has {shown(layer_type)}, which is not supported; allowed: 'full_attention'",
            )


def refuse_qwen_windows(hf_config: Mapping[str, Any]) -> None:
    """Raise ModelError where a layer of a dense Qwen model has a window: those that `layer_types`
    names, else those from `max_window_layers` on, and none without `use_sliding_window`."""
    config = ConfigReader(hf_config)
    if hf_config.get("layer_types") is not None:
        if not _has_whole_windows(hf_config):
            refuse_windowed_layers(hf_config)
    elif config.flag("use_sliding_window", False):
        refuse_sliding_window(hf_config, from_layer=config.count("max_window_layers"))


def _has_whole_windows(hf_config: Mapping[str, Any]) -> bool:
    """Whether layers with windows, if there are any, see the whole context."""
    config = ConfigReader(hf_config)
    window = config.optional_size("sliding_window")
    types = hf_config["layer_types"]
    return (
        config.flag("use_sliding_window", False)
        and window is not None
        and window >= context_length(hf_config)
        and isinstance(types, list)
        and all(kind in ("full_attention", "sliding_attention") for kind in types)
    )


def _check_rope(spec: DecoderSpec) -> None:
    dim, head_dim, fraction = spec.rope_dim, spec.head_dim, spec.rope.fraction
    name, size = ("qk_rope_head_dim", dim) if spec.latent_attention else ("head_dim", head_dim)
    if size % 2 != 0:
        raise ModelKeyError(name, f"={size} must be even (rotary embedding)")
    if dim % 2 != 0 or dim == 0:
        raise ModelKeyError(
            "partial_rotary_factor",
            f"={fraction} turns {dim} of the {head_dim} values of a head; needed: an even number "
            "above 0",
        )
    factors = spec.rope.frequency_factors
    if factors and len(factors) != dim // 2:
        raise ModelKeyError(
            "rope_scaling",
            f": {len(factors)} factors for {dim} values of a head that turn; needed: {dim // 2}",
        )
