"""The built-in families: what they register, which plans they allow, and their sizes."""

import subprocess
import sys
from typing import Any

from core.parallel.plan import Plan
from core.plugin.hookspecs import NoOptions
from core.plugin.plugin_manager import PluginManager
from core.settings.compose import compose, parse_overrides
from core.settings.config import PluginChoice
from plugins.models import llama
from tests.support.models import family_of

NAMES = [
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
]


def test_every_family_is_registered_and_built() -> None:
    table = PluginManager.load([]).table("model")
    built_in = [name for name in table if table.plugin_of(name).startswith("plugins.")]
    assert sorted(built_in) == NAMES
    families = {name: table.create(PluginChoice(name=name)) for name in NAMES}
    assert len({type(family) for family in families.values()}) == len(NAMES)
    for name, family in families.items():
        assert type(family).__name__.removesuffix("Family") == name.removesuffix("ForCausalLM")


def test_reading_a_model_imports_no_torch() -> None:
    script = """
import sys
from core.parallel.plan import Plan
from core.plugin.plugin_manager import PluginManager
shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
             vocab_size=300, max_position_embeddings=128, sliding_window=None, num_experts=8,
             moe_intermediate_size=32, num_experts_per_tok=2, n_routed_experts=8, q_lora_rank=None,
             kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_group=2,
             topk_group=1)
families = PluginManager.load([]).table("model").create_all()
assert len(families) >= 9
for family in families.values():
    assert family.plan_problems(family.parse(shape), Plan(tp_attn=3, tp_expert=3))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def tp(ranks: int) -> Plan:
    return Plan(tp_attn=ranks, tp_expert=ranks)


def preset_config(name: str) -> dict[str, Any]:
    shape = compose(parse_overrides([f"+model={name}"])).model.shape
    assert shape is not None
    return shape


def test_a_presets_plans_name_what_is_allowed() -> None:
    hf_config = preset_config("llama31_8b")
    family = family_of(hf_config)
    spec = family.parse(hf_config)
    allowed = [ranks for ranks in range(1, 65) if not family.plan_problems(spec, tp(ranks))]
    assert allowed == [1, 2, 4, 8, 16, 32]
    problems = family.plan_problems(spec, tp(3))
    assert len(problems) == 3
    for problem in problems:
        assert problem.startswith("parallel.tp=3")
        assert problem.endswith("1, 2, 4, 8, 16, 32")


def test_smollm2_runs_on_one_or_three_ranks() -> None:
    hf_config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    }
    family = llama.family(NoOptions())
    spec = family.parse(hf_config)
    assert [ranks for ranks in range(1, 20) if not family.plan_problems(spec, tp(ranks))] == [1, 3]
