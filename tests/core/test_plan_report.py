"""Plans of real models add up to what their authors publish, with every part held somewhere."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from core.engine.build.model import measure_rank
from core.errors import ConfigError
from core.interfaces.model import BuildContext, LatentKVShape, Model, ModelSpec
from core.interfaces.weights import Shard
from core.parallel.plan import Plan
from core.plan_report import PlanReport, plan_report
from core.plugin.plugin_manager import PluginManager
from core.settings.compose import compose, parse_overrides
from core.settings.config import AppConfig, PluginChoice
from tests.support.models import TINY, family_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Parameters as model cards, transformers and safetensors indices count them; DeepSeek's and
# GLM's without the layer that drafts tokens.
PARAMETERS = {
    "llama31_8b": 8_030_261_248,
    "llama31_405b": 405_853_388_800,
    "qwen3_8b": 8_190_735_360,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "mixtral_8x7b": 46_702_792_704,
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v3": 671_026_419_200,
    "deepseek_r1": 671_026_419_200,
    "glm4_5": 352_797_829_024,
    "glm4_5_air": 106_852_251_264,
}


def shape_of(name: str) -> dict[str, Any]:
    shape = configured(name).model.shape
    assert shape is not None
    return shape


def configured(name: str, *words: str) -> AppConfig:
    return compose(parse_overrides([f"+model={name}", *words]))


def plan_named(name: str) -> Plan:
    config = configured("smollm2", f"parallel={name}").parallel
    plan = (
        PluginManager.load().table("parallel_plan").create(PluginChoice(name=config.plan), config)
    )
    assert isinstance(plan, Plan)
    return plan


def report(
    shape: dict[str, Any], plan: Plan, device: torch.device = CUDA, num_nodes: int = 1
) -> PlanReport:
    family = family_of(shape)
    spec = family.parse(shape)
    assert family.plan_problems(spec, plan) == []
    return plan_report(family, spec, plan, dtype=torch.bfloat16, device=device, num_nodes=num_nodes)


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_parameters(name: str) -> None:
    found = report(shape_of(name), Plan(), CPU)
    assert found.num_parameters == found.num_distinct == PARAMETERS[name]
    values = sum(t.num_tensors * math.prod(t.shape) for t in found.tensors)
    assert values == PARAMETERS[name]


@pytest.mark.parametrize(
    "name", ["deepseek_v3", "deepseek_v2_lite", "qwen3_30b_a3b", "mixtral_8x7b", "glm4_5_air"]
)
def test_parameters_are_those_that_transformers_makes(name: str) -> None:
    import transformers

    shape = {key: value for key, value in shape_of(name).items() if key != "quantization_config"}
    config = transformers.AutoConfig.for_model(**shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    persistent = model.state_dict()  # the correction bias is no parameter there
    assert sum(tensor.numel() for tensor in persistent.values()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("deepseek_v3", "tp16"),
        ("deepseek_v3", "tp16_ep16"),
        ("deepseek_v3", "tp16_ep16_dp16"),
        ("deepseek_v3", "tp32"),
        ("llama31_405b", "tp16"),
        ("llama31_405b", "tp32"),
    ],
)
def test_real_models_over_real_plans_add_up(name: str, plan: str) -> None:
    shape = shape_of(name)
    if plan == "tp32":  # too many ranks for blocks of 128 of DeepSeek's experts; bfloat16 fits
        shape = {key: value for key, value in shape.items() if key != "quantization_config"}
    found = report(shape, plan_named(plan))
    assert found.num_parameters == found.num_distinct == PARAMETERS[name]
    assert len({rank.weight_bytes for rank in found.ranks}) == 1
    assert found.weight_bytes == sum(rank.weight_bytes for rank in found.ranks)
    world = found.plan.world_size
    for tensor in found.tensors:
        # A rank that holds no part of a tensor is one that holds other experts.
        spread = found.plan.ep if ".experts." in tensor.name else 1
        kv_heads = 8 if name == "llama31_405b" else world
        assert tensor.num_parts * tensor.num_copies * spread == world, tensor
        if ".k_proj" in tensor.name or ".v_proj" in tensor.name:
            assert tensor.num_parts == min(kv_heads, found.plan.tp_attn)


def test_attention_and_experts_lie_as_the_plan_says() -> None:
    found = report(shape_of("deepseek_v3"), plan_named("tp16_ep16_dp16"), num_nodes=2)
    of = {tensor.name.removeprefix("model.layers.*."): tensor for tensor in found.tensors}
    assert of["self_attn.q_b_proj.weight"].num_copies == 16  # each DP rank has all heads
    assert of["mlp.experts.*.up_proj.weight"].num_copies == 1
    assert of["mlp.experts.*.up_proj.weight"].num_tensors == 58 * 256
    assert (of["lm_head.weight"].num_parts, of["lm_head.weight"].part_shape) == (16, (8080, 7168))
    assert of["mlp.gate.e_score_correction_bias"].dtype == "float32"
    assert [rank.node for rank in found.ranks] == [0] * 8 + [1] * 8
    assert [rank.coordinates["ep"] for rank in found.ranks] == list(range(16))
    assert {rank.num_experts for rank in found.ranks} == {16}
    assert found.kv_token_bytes == 61 * (512 + 64) * 2


def test_redundant_experts_are_more_copies_of_the_same_parameters() -> None:
    plan = replace(plan_named("tp16_ep16_dp16"), redundant_experts=32)
    found = report(shape_of("deepseek_v3"), plan)
    plain = report(shape_of("deepseek_v3"), plan_named("tp16_ep16_dp16"))
    assert found.num_parameters == found.num_distinct == PARAMETERS["deepseek_v3"]
    assert {rank.num_experts for rank in found.ranks} == {18}
    expert_bytes = 3 * 2048 * 7168 + 3 * 4 * 16 * 56
    assert found.weight_bytes - plain.weight_bytes == 58 * 32 * expert_bytes


def test_groups_count_as_a_cpu_keeps_them() -> None:
    """Layers of a GGUF file differ in their bits: each counts by itself."""
    shape = TINY | {"architectures": ["LlamaForCausalLM"]}
    family, spec = family_of(shape), family_of(shape).parse(shape)
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)]
    group_bits = dict(zip(names, (4, 8), strict=False))  # the third is stored otherwise
    found = plan_report(
        family, spec, Plan(), dtype=torch.float32, device=CPU, group_bits=group_bits
    )
    plain = plan_report(family, spec, Plan(), dtype=torch.float32, device=CPU)
    num_values = 96 * 192
    less = 2 * 4 * num_values - (0.625 + 1.25) * num_values
    assert plain.weight_bytes - found.weight_bytes == less
    assert found.num_parameters == found.num_distinct == plain.num_parameters
    tied = shape | {"tie_word_embeddings": True}
    table = {"model.embed_tokens.weight": 8}
    both = plan_report(
        family, family.parse(tied), Plan(), dtype=torch.float32, device=CPU, group_bits=table
    )
    assert both.num_distinct == both.num_parameters, "a table that is kept in two forms"
    dtypes = [t.dtype for t in found.tensors if t.name == "model.layers.*.mlp.down_proj.weight"]
    assert dtypes == ["4-bit groups", "8-bit groups", "float32"]
    kept = measure_rank(
        family, spec, Plan(), 0, dtype=torch.float32, device=CPU, group_bits=group_bits
    )
    assert found.weight_bytes == kept.num_bytes, "what the engine reckons with"


def test_quantised_weights_count_as_they_are_kept() -> None:
    found = report(shape_of("deepseek_v3"), Plan(), CUDA)
    expected = 0
    for tensor in found.tensors:
        values = math.prod(tensor.shape)
        size: float = {"bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}[tensor.dtype] * values
        if tensor.dtype == "float8_e4m3fn":
            size += 4 * math.prod(math.ceil(length / 128) for length in tensor.shape)
        expected += tensor.num_tensors * int(size)
    assert found.weight_bytes == expected
    # Embedding, head, gates, norms and what expands latents stay as they are.
    assert 671e9 < found.weight_bytes < 1.01 * 671e9 + 2 * 129280 * 7168
    dequantised = report(shape_of("deepseek_v3"), Plan(), CPU).weight_bytes
    assert dequantised == 2 * PARAMETERS["deepseek_v3"] + 2 * 58 * 256  # that bias is float32


@pytest.mark.parametrize("plan", ["tp16", "tp16_ep16"])
def test_one_layer_of_a_kind_stands_for_all(plan: str) -> None:
    """Against a build of all 61 layers."""
    shape = shape_of("deepseek_v3")
    family, of = family_of(shape), plan_named(plan)
    whole = measure_rank(family, family.parse(shape), of, 3, dtype=torch.bfloat16, device=CUDA)
    found = report(shape, of)
    assert found.ranks[3].weight_bytes == whole.num_bytes
    names = {take.name for take in whole.manifest}
    assert sum(t.num_tensors for t in found.tensors if ".experts." not in t.name) == sum(
        ".experts." not in name for name in names
    )


class HalfFamily:
    """Every rank keeps the first half of the only tensor, whatever the plan says."""

    def parse(self, hf_config: Mapping[str, Any]) -> ModelSpec:
        raise AssertionError("not read")

    def plan_problems(self, spec: ModelSpec, plan: Plan) -> list[str]:
        return []

    def build(self, spec: ModelSpec, context: BuildContext) -> Model:
        context.weights.take("model.layers.1.x", (10, 4), Shard(0, 0, 2))
        return HalfModel()  # type: ignore[return-value]


class HalfModel:
    kv = LatentKVShape(num_layers=2, latent_dim=3, rope_dim=1, nope_dim=1, value_dim=1, scale=1.0)


def test_a_part_that_nobody_holds_is_missed() -> None:
    spec = ModelSpec(
        architecture="Half",
        num_layers=2,
        hidden_size=4,
        num_heads=2,
        num_kv_heads=2,
        head_dim=2,
        intermediate_size=4,
        vocab_size=300,
        max_position_embeddings=16,
        dtype="float32",
    )
    plan = Plan(tp_attn=2, tp_expert=2)
    found = plan_report(HalfFamily(), spec, plan, dtype=torch.float32, device=CPU)
    assert (found.num_parameters, found.num_distinct) == (40, 20)
    assert found.weight_bytes == 2 * 20 * 4
    assert found.kv_token_bytes == 2 * 4 * 4


def test_nodes_must_divide_the_ranks() -> None:
    with pytest.raises(ConfigError, match=r"3 nodes .* 8 ranks of the plan; allowed: 1, 2, 4, 8"):
        report(shape_of("llama31_8b"), Plan(tp_attn=8, tp_expert=8), num_nodes=3)
