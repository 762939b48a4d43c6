"""Every key that transformers' config classes read is applied, refused or known to mean nothing
here; and the tables that say which tell the truth. The oracle is transformers itself."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers

from core.errors import ModelError
from core.interfaces.model import ModelSpec
from core.layers.basic.config_keys import IGNORED, NEUTRAL, READ, ConfigKeys
from core.layers.decoder.decoder_config import _QUANTIZATION, QUANTIZATION_IGNORED
from core.plugin.plugin_manager import PluginManager
from plugins.models import deepseek, glm4_moe, llama, mixtral, qwen3, qwen3_moe
from tests.support.models import TINY, TINY_MODELS, family_of

# Name of a tiny checkpoint (tests.support.models) -> the keys of its family.
FAMILIES: dict[str, ConfigKeys] = {
    "llama": llama.LLAMA_KEYS,
    "mistral": llama.MISTRAL_KEYS,
    "qwen2": qwen3.QWEN2_KEYS,
    "qwen3": qwen3.QWEN3_KEYS,
    "qwen3_moe": qwen3_moe.KEYS,
    "mixtral": mixtral.KEYS,
    "deepseek_v3": deepseek.V3_KEYS,
    "deepseek_v2": deepseek.V2_KEYS,
    "glm4_moe": glm4_moe.KEYS,
}
# Keys that transformers takes out of config.json beside the fields of a config class.
POPPED = (
    "torch_dtype", "rope_theta", "rope_scaling", "partial_rotary_factor", "num_labels",
    "name_or_path", "_commit_hash", "output_attentions", "attn_implementation",
    "experts_implementation", "per_layer_config", "quantization_config", "model_type",
    "original_max_position_embeddings", "layer_types", "head_dim",
)  # fmt: skip
# What other values of the keys that are read look like: each changes the spec, or is refused.
OTHER: dict[str, Any] = {
    "attention_bias": None,  # the other one of the base, see `other_value`
    "decoder_sparse_step": 2,
    "dtype": "bfloat16",
    "first_k_dense_replace": 2,
    "head_dim": 8,
    "hidden_act": "gelu",
    "hidden_size": 192,
    "intermediate_size": 96,
    "kv_lora_rank": 16,
    "layer_types": ["sliding_attention"] * 3,
    "max_position_embeddings": 1024,
    "max_window_layers": 0,
    "mlp_bias": None,
    "mlp_only_layers": [0],
    "model_type": "other",
    "moe_intermediate_size": 32,
    "moe_layer_freq": 2,
    "n_group": 8,
    "n_routed_experts": 32,
    "n_shared_experts": 3,
    "norm_topk_prob": None,
    "num_attention_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_nextn_predict_layers": 3,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.25,
    "per_layer_config": {"0": {"num_key_value_heads": 2}},
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-4,
    "rope_interleave": None,
    "rope_interleaved": True,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_theta": 5e4,
    "routed_scaling_factor": 7.0,
    "scoring_func": "other",
    "sliding_window": 64,
    "tie_word_embeddings": None,
    "topk_group": 1,
    "topk_method": "other",
    "torch_dtype": "bfloat16",
    "use_qk_norm": None,
    "use_sliding_window": None,
    "v_head_dim": 8,
    "vocab_size": 300,
    "is_encoder_decoder": True,
}
# Read elsewhere: to pick the family, and to know what ends an answer (core.sources.files).
ELSEWHERE = {"architectures", "eos_token_id"}


def config_class(name: str) -> Any:
    return getattr(transformers, f"{TINY_MODELS[name][0]}Config")


def base(name: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model, as short as a family allows."""
    prefix, own = TINY_MODELS[name]
    config = TINY | own | {"architectures": [f"{prefix}ForCausalLM"]} | changes
    return {key: value for key, value in config.items() if key != "initializer_range"}


def parse(hf_config: dict[str, Any]) -> ModelSpec:
    return family_of(hf_config).parse(hf_config)


def parsed_or_error(hf_config: dict[str, Any]) -> ModelSpec | str:
    try:
        return parse(hf_config)
    except ModelError as error:
        return str(error)


def keys_of_class(name: str) -> set[str]:
    cls = config_class(name)
    generation = transformers.GenerationConfig._get_default_generation_params()
    fields = {field.name for field in dataclasses.fields(cls)}
    mapped = set(cls.attribute_map) | set(cls.attribute_map.values())
    return fields | mapped | {*POPPED, *generation}


def test_every_family_is_held_to_its_keys() -> None:
    table = PluginManager.load([]).table("model")
    built_in = {name for name in table if table.plugin_of(name).startswith("plugins.")}
    assert {f"{TINY_MODELS[name][0]}ForCausalLM" for name in FAMILIES} == built_in


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_is_in_one_table(name: str) -> None:
    keys = FAMILIES[name]
    tables = [READ | keys.read, {*NEUTRAL, *keys.neutral}, {*IGNORED, *keys.ignored}]
    known = set[str]().union(*tables, keys.aliases)
    assert keys_of_class(name) <= known
    # A family may ignore what others read, for a reason of its own; else a key is in one table.
    assert not tables[0] & tables[1]
    assert not tables[1] & tables[2]
    assert tables[0] & tables[2] <= keys.ignored.keys() & READ
    assert all(keys.aliases[alias] in keys.read for alias in keys.aliases)
    assert all(reason for reason in (*IGNORED.values(), *keys.ignored.values()))


def other_value(name: str, key: str) -> dict[str, Any]:
    """Changes that make a key say something else than the base, where it can."""
    windows = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}
    if OTHER[key] is None and key != "use_sliding_window":
        default = getattr(config_class(name)(), key, False)
        return {key: not base(name).get(key, default)}
    if key == "use_sliding_window":
        return {"sliding_window": 64, "max_window_layers": 0, key: True}
    if key == "max_window_layers":
        return windows | {key: 0}
    if key == "sliding_window" and name.startswith("qwen"):
        return {"use_sliding_window": True, "max_window_layers": 0, key: 64}
    if key == "rope_theta" or key == "rope_scaling" or key == "rope_parameters":
        return {"rope_parameters": None, key: OTHER[key]}
    if key == "original_max_position_embeddings":
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
        return {"rope_parameters": yarn, key: 64}
    return {key: OTHER[key]}


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_that_are_read_count(name: str) -> None:
    keys = FAMILIES[name]
    for key in sorted((READ | keys.read | {*NEUTRAL, *keys.neutral}) - ELSEWHERE):
        if key in keys.ignored:
            continue
        changes = other_value(name, key)
        before = base(name, **{other: value for other, value in changes.items() if other != key})
        expected = parse({k: v for k, v in before.items() if k != key or key in base(name)})
        found = parsed_or_error(base(name, **changes))
        assert found != expected, key
        if isinstance(found, str):  # by the key's own name, or that of what it brings into play
            assert key in found or "rope" in key or "window" in key, (key, found)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_out_means_what_it_means_to_transformers(name: str) -> None:
    keys = FAMILIES[name]
    compared = 0
    for field in dataclasses.fields(config_class(name)):
        key = field.name
        if key not in READ | keys.read or key in ELSEWHERE | keys.ignored.keys():
            continue
        # 32 heads, so that the default number of KV heads is one that a model can have.
        whole = base(name, num_attention_heads=32, rope_parameters=None)
        if key == "norm_topk_prob":
            whole[key] = True
        whole.setdefault(key, OTHER[key])
        left_out = {k: v for k, v in whole.items() if k != key}
        found = parsed_or_error(left_out)
        if isinstance(found, str):
            assert key in found, (key, found)
            continue
        default = field.default
        if key in ("num_key_value_heads", "head_dim") and default is None:
            made = config_class(name)(**left_out)
            default = getattr(made, key)
        assert found == parse(whole | {key: default}), key
        compared += 1
    assert compared >= 5


@pytest.mark.parametrize("name", FAMILIES)
def test_theta_left_out_is_transformers_default(name: str) -> None:
    spec: Any = parse(base(name, rope_parameters=None))
    assert spec.rope.theta == config_class(name).default_theta


def outputs(name: str, changes: dict[str, Any]) -> torch.Tensor:
    prefix, own = TINY_MODELS[name]
    config = config_class(name)(**(TINY | own | {"num_hidden_layers": 1} | changes))
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = getattr(transformers, f"{prefix}ForCausalLM")(config).state_dict()
    model: Any = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    weights = {k: torch.randn(v.shape, generator=generator) * 0.1 for k, v in shapes.items()}
    model.load_state_dict(weights)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([[5, 6, 7, 8]])).logits
    return logits


IGNORED_VALUES: dict[str, Any] = {
    "attention_dropout": 0.5,
    "initializer_range": 0.01,
    "pretraining_tp": 2,
    "chunk_size_feed_forward": 2,
    "use_cache": False,
    "bos_token_id": 3,
    "pad_token_id": 4,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.5,
    "num_key_value_heads": None,
    "max_window_layers": 0,
    "id2label": {"0": "a"},
    "temperature": 0.1,
    "repetition_penalty": 9.0,
    "transformers_version": "1.0",
    "tie_last_hidden_states": False,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_ignored_keys_change_nothing_in_transformers(name: str) -> None:
    keys = FAMILIES[name]
    known = keys_of_class(name)
    changes = {
        key: value
        for key, value in IGNORED_VALUES.items()
        if key in known and key in {**IGNORED, **keys.ignored}
    }
    assert len(changes) > 8
    assert torch.equal(outputs(name, changes), outputs(name, {}))


def test_every_key_of_a_quantisation_config_is_in_a_table() -> None:
    import inspect

    from transformers import FineGrainedFP8Config

    read = set(inspect.signature(FineGrainedFP8Config).parameters) - {"kwargs"}
    assert read | {"quant_method", "ignored_layers"} <= _QUANTIZATION.keys() | QUANTIZATION_IGNORED
