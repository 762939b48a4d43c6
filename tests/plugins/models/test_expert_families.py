"""What the config.json files of families with experts say, and the errors for the rest."""

from typing import Any

import pytest

from core.errors import ModelError
from core.interfaces.model import MoESpec
from core.layers.attention.gqa_spec import GroupedQuerySizes
from core.layers.attention.mla_spec import LatentAttentionSizes
from core.layers.decoder.decoder_spec import DecoderSpec, DenseMLPSpec
from core.layers.experts.moe_spec import MoELayerSpec, Routing
from core.parallel.plan import Plan
from tests.support.models import family_of

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "vocab_size": 300,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 4,
}
LATENT: dict[str, Any] = SIZES | {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "v3": LATENT
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": 48,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 2,
    },
    "v2": LATENT
    | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "q_lora_rank": None,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "greedy",
    },
    "glm": SIZES
    | {
        "architectures": ["Glm4MoeForCausalLM"],
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 2,
        "routed_scaling_factor": 2.5,
    },
    "qwen": SIZES
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 16,
        "norm_topk_prob": True,
    },
    "mixtral": SIZES
    | {
        "architectures": ["MixtralForCausalLM"],
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "sliding_window": None,
    },
}


def parse(name: str, **changes: Any) -> DecoderSpec:
    hf_config = CONFIGS[name] | changes
    spec = family_of(hf_config).parse(hf_config)
    assert isinstance(spec, DecoderSpec)
    return spec


def problems(name: str, plan: Plan, **changes: Any) -> list[str]:
    hf_config = CONFIGS[name] | changes
    return family_of(hf_config).plan_problems(parse(name, **changes), plan)


def test_deepseek_v3_is_read() -> None:
    spec = parse("v3")
    assert spec.latent_attention
    assert isinstance(spec.attention, LatentAttentionSizes)
    assert (spec.attention.q_lora_rank, spec.attention.rope_interleaved) == (48, True)
    assert (spec.head_dim, spec.rope_dim) == (24, 8)
    assert spec.moe == MoESpec(
        num_experts=16, top_k=4, intermediate_size=64, layers=(2, 3, 4, 5), num_groups=4
    )
    assert spec.experts is not None
    assert spec.experts.has_bias
    assert spec.experts.shared_intermediate_size == 128
    assert spec.experts.routing == Routing(
        top_k=4,
        scoring="sigmoid",
        normalise=True,
        scale=2.5,
        num_groups=4,
        num_chosen_groups=2,
        group_top=2,
    )
    # Layers for drafting tokens, behind the model's own; not those of layer 60 of another model.
    assert spec.ignored_tensors == ("model.layers.6.", "model.layers.7.")


def test_layers_are_dense_or_of_experts() -> None:
    spec = parse("v3")
    dense = [isinstance(spec.mlp_of(layer), DenseMLPSpec) for layer in range(6)]
    assert dense == [True, True, False, False, False, False]
    assert isinstance(parse("v3", first_k_dense_replace=6).mlp_of(5), DenseMLPSpec)
    assert parse("v3", first_k_dense_replace=6).moe is None
    every_other = parse("v2", first_k_dense_replace=1, moe_layer_freq=2)
    assert every_other.moe is not None
    assert every_other.moe.layers == (2, 4)


def test_deepseek_v2_scores_by_softmax() -> None:
    spec = parse("v2")
    assert spec.experts is not None
    assert spec.experts.routing == Routing(top_k=4, scoring="softmax", normalise=False)
    assert not spec.experts.has_bias
    grouped = parse("v2", topk_method="group_limited_greedy", routed_scaling_factor=16.0).experts
    assert grouped is not None
    assert grouped.routing == Routing(
        top_k=4,
        scoring="softmax",
        normalise=False,
        scale=16.0,
        num_groups=4,
        num_chosen_groups=2,
        group_top=1,
    )
    assert spec.ignored_tensors == ()


def test_no_shared_experts() -> None:
    experts = parse("v2", n_shared_experts=None).experts
    assert experts is not None
    assert experts.shared_intermediate_size is None


def test_glm4_moe_is_read() -> None:
    spec = parse("glm")
    assert isinstance(spec.attention, GroupedQuerySizes)
    assert (spec.attention.qkv_bias, spec.attention.output_bias) == (True, False)
    assert spec.attention.qk_norm
    assert (spec.head_dim, spec.rope_dim) == (16, 8)  # half of a head turns where nothing is said
    assert spec.moe is not None
    assert spec.moe.layers == (2, 3, 4, 5)
    assert spec.experts is not None
    assert spec.experts.has_bias
    assert spec.experts.shared_intermediate_size == 128
    assert spec.experts.routing == Routing(
        top_k=4,
        scoring="sigmoid",
        normalise=True,
        scale=2.5,
        num_groups=4,
        num_chosen_groups=2,
        group_top=2,
    )
    assert spec.ignored_tensors == ("model.layers.6.",)
    assert parse("glm", num_mtp_layers=0).ignored_tensors == ()
    bare = parse("glm", attention_bias=None, use_qk_norm=None).attention
    assert isinstance(bare, GroupedQuerySizes)
    assert not bare.qkv_bias
    assert not bare.qk_norm


@pytest.mark.parametrize(
    ("changes", "turned"),
    [
        ({"partial_rotary_factor": 0.25}, 4),
        ({"partial_rotary_factor": 1}, 16),
        ({"partial_rotary_factor": None}, 16),  # as transformers takes null, unlike a missing key
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.75}}, 12),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 8),
        ({"partial_rotary_factor": 0.3}, 4),  # 4.8, cut off
    ],
)
def test_values_of_a_head_that_turn_are_as_many_as_transformers_turns(
    changes: dict[str, Any], turned: int
) -> None:
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    rotary = Glm4MoeRotaryEmbedding(Glm4MoeConfig(**(CONFIGS["glm"] | changes)))
    assert 2 * rotary.inv_freq.shape[0] == turned
    assert parse("glm", **changes).rope_dim == turned


def test_qwen3_moe_is_read() -> None:
    spec = parse("qwen", mlp_only_layers=[3], decoder_sparse_step=2)
    assert spec.moe is not None
    assert spec.moe.layers == (1, 5)
    assert isinstance(spec.attention, GroupedQuerySizes)
    assert spec.attention.qk_norm
    renamed = dict(CONFIGS["qwen"])
    renamed["num_local_experts"] = renamed.pop("num_experts")
    assert family_of(renamed).parse(renamed).moe == parse("qwen").moe


def test_mixtral_is_read() -> None:
    spec = parse("mixtral")
    mlp = spec.mlp_of(0)
    assert isinstance(mlp, MoELayerSpec)
    assert (mlp.block, mlp.names.gate, mlp.expert_intermediate_size) == (
        "block_sparse_moe",
        "w1",
        192,
    )
    assert mlp.routing.normalise
    assert spec.rope.theta == 1e6  # what its config means by saying nothing
    assert parse("mixtral", rope_theta=5e5).rope.theta == 5e5


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("v3", {"scoring_func": "softmax"}, ["scoring_func='softmax'", "sigmoid"]),
        ("v3", {"topk_method": "greedy"}, ["topk_method='greedy'", "noaux_tc"]),
        ("v3", {"n_group": 3}, ["n_group=3", "16 experts"]),
        ("v3", {"n_group": 16, "topk_group": 4}, ["n_group=16", "2 or more"]),
        ("v3", {"topk_group": 5}, ["topk_group=5", "n_group=4"]),
        ("v3", {"num_experts_per_tok": 9}, ["num_experts_per_tok=9", "8 experts"]),
        ("v3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["'linear'", "yarn"]),
        ("v3", {"qk_rope_head_dim": 7}, ["qk_rope_head_dim=7", "even"]),
        ("v3", {"q_lora_rank": 0}, ["q_lora_rank=0", "above 0"]),
        ("v3", {"kv_lora_rank": None}, ["kv_lora_rank=None", "above 0"]),
        ("v3", {"n_shared_experts": -1}, ["n_shared_experts=-1", "0 or more"]),
        ("v3", {"first_k_dense_replace": "3"}, ["first_k_dense_replace='3'"]),
        ("v3", {"num_nextn_predict_layers": -1}, ["num_nextn_predict_layers=-1"]),
        ("v3", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", "1.0"]),
        ("glm", {"partial_rotary_factor": 0.45}, ["partial_rotary_factor=0.45", "turns 7", "even"]),
        ("glm", {"partial_rotary_factor": 0.05}, ["partial_rotary_factor=0.05", "turns 0", "even"]),
        ("glm", {"head_dim": 15}, ["head_dim=15", "even"]),
        ("glm", {"scoring_func": "softmax"}, ["scoring_func='softmax'", "sigmoid"]),
        ("glm", {"topk_method": "greedy"}, ["topk_method='greedy'", "noaux_tc"]),
        ("glm", {"n_group": 3}, ["n_group=3", "16 experts"]),
        ("glm", {"use_qk_norm": 1}, ["use_qk_norm=1", "true or false"]),
        ("glm", {"n_routed_experts": None}, ["n_routed_experts=None"]),
        ("qwen", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", "1.0"]),
        ("v2", {"scoring_func": "sigmoid"}, ["scoring_func='sigmoid'", "softmax"]),
        ("v2", {"topk_method": "noaux_tc"}, ["topk_method='noaux_tc'", "group_limited_greedy"]),
        ("v2", {"norm_topk_prob": True}, ["norm_topk_prob=True", "false"]),
        ("v2", {"mlp_bias": True}, ["mlp_bias=True", "false"]),
        ("qwen", {"num_experts_per_tok": 17}, ["num_experts_per_tok=17", "16 experts"]),
        ("qwen", {"mlp_only_layers": [6]}, ["mlp_only_layers=[6]", "0 to 5"]),
        ("qwen", {"mlp_only_layers": 1}, ["mlp_only_layers=1", "a list"]),
        ("qwen", {"decoder_sparse_step": 0}, ["decoder_sparse_step=0", "above 0"]),
        (
            "qwen",
            {"use_sliding_window": True, "sliding_window": 64},
            ["sliding_window=64", "null"],
        ),
        ("mixtral", {"sliding_window": 511}, ["sliding_window=511", "null"]),
        (
            "qwen",
            {"num_local_experts": 8},
            ["num_experts=16", "num_local_experts=8", "contradict"],
        ),
        ("mixtral", {"num_local_experts": "8"}, ["num_local_experts='8'"]),
    ],
)
def test_what_is_not_supported_is_named(
    name: str, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ModelError) as error:
        parse(name, **changes)
    assert "config.json" in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_each_cut_is_checked_over_its_own_ranks() -> None:
    assert problems("v3", Plan(dp=2, tp_attn=4, ep=8)) == []
    (attention,) = problems("v3", Plan(dp=2, tp_attn=3, ep=6))
    assert attention.startswith("parallel.tp / parallel.dp_attention = 6 / 2: ")
    assert attention.endswith("8 query heads; allowed for this model: 1, 2, 4, 8")
    (dense,) = problems("v3", Plan(dp=5, ep=5, tp_dense=5))
    assert dense.startswith("parallel.dense_tp=5: ")
    assert "intermediate_size of 192" in dense
    assert dense.endswith("1, 2, 3, 4, 6, 8")
    (expert,) = problems("v3", Plan(dp=6, ep=2, tp_expert=3))
    assert expert.startswith("parallel.tp / parallel.ep = 6 / 2: ")
    assert "size of one expert of 64" in expert
    # Without experts spread, all of it is cut by one number, and one list says what would do.
    plain = problems("v3", Plan(tp_attn=3, tp_expert=3))
    assert len(plain) == 3  # 3 divides the dense size
    assert all(p.startswith("parallel.tp=3: ") and p.endswith(": 1, 2, 4, 8") for p in plain)


def test_a_model_of_experts_only_has_no_dense_size_to_cut() -> None:
    assert problems("qwen", Plan(dp=8, ep=8, tp_dense=8), intermediate_size=100) == []
    assert problems(
        "qwen", Plan(dp=8, ep=8, tp_dense=8), intermediate_size=100, mlp_only_layers=[0]
    )


def test_quantised_weights_are_cut_between_blocks() -> None:
    quantised = {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "qk_nope_head_dim": 96,
        "qk_rope_head_dim": 32,
        "v_head_dim": 128,
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
    }
    assert problems("v3", Plan(tp_attn=2, tp_expert=2), **quantised) == []
    found = problems("v3", Plan(tp_attn=8, tp_expert=8), **quantised)
    assert len(found) == 3  # one for heads would be wrong: eight of 128 dimensions each
    assert "intermediate_size of 512 into parts of 64" in found[0]
    assert all(problem.endswith("allowed for this model: 1, 2") for problem in found)
    # Spread experts are whole, and so are the shared ones.
    assert problems("v3", Plan(dp=8, ep=8), **quantised) == []
    (attention,) = problems(
        "v3", Plan(dp=2, tp_attn=4, ep=8, tp_dense=1), **(quantised | {"v_head_dim": 48})
    )
    assert "output projection of 384 into parts of 96" in attention
