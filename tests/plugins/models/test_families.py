"""The built-in families: what they register, which plans they allow, and their sizes."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from core.compose import compose, parse_overrides
from core.config import PluginChoice
from core.hookspecs import NoOptions
from core.interfaces.model import BuildContext
from core.kernels.torch_ops import TorchOps
from core.loading.reader import ShapeReader
from core.plugin_manager import PluginManager
from plugins.models import llama, qwen3
from tests.support.models import family_of
from tests.support.ranks import tp_comms

NAMES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
META = torch.device("meta")


def test_every_family_is_registered_and_built() -> None:
    registrations = [*llama.register_model(), *qwen3.register_model()]
    assert sorted(registration.name for registration in registrations) == NAMES
    table = PluginManager.load([]).table("model")
    for registration in registrations:
        family = table.create(PluginChoice(name=registration.name))
        hf_config = {"architectures": [registration.name]}
        assert type(family) is type(family_of(hf_config))


def test_reading_a_model_imports_no_torch() -> None:
    script = """
import sys
from core.hookspecs import NoOptions
from plugins.models import llama, qwen3
llama.register_model(), qwen3.register_model()
shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
             vocab_size=300, max_position_embeddings=128, sliding_window=None)
for family in (llama.family, llama.mistral_family, qwen3.family, qwen3.qwen2_family):
    family = family(NoOptions())
    assert family.plan_problems(family.parse(shape), 3)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def preset_config(name: str) -> dict[str, Any]:
    shape = compose(parse_overrides([f"+model={name}"])).model.shape
    assert shape is not None
    return shape


def rank_shapes(hf_config: dict[str, Any], tp: int) -> list[ShapeReader]:
    """What each of `tp` ranks would hold."""
    family = family_of(hf_config)
    spec = family.parse(hf_config)
    assert family.plan_problems(spec, tp) == []
    readers = []
    for comms in tp_comms(tp):
        reader = ShapeReader(torch.bfloat16)
        context = BuildContext(
            weights=reader, comms=comms, ops=TorchOps(), dtype=torch.bfloat16, device=META
        )
        family.build(spec, context)
        readers.append(reader)
    return readers


# Parameters as the model cards and transformers count them.
PARAMETERS = {
    "llama31_8b": 8_030_261_248,
    "llama31_405b": 405_853_388_800,
    "qwen3_8b": 8_190_735_360,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_model_whatever_tp(name: str) -> None:
    hf_config = preset_config(name)
    (whole,) = rank_shapes(hf_config, 1)
    assert whole.num_logical_parameters == PARAMETERS[name]
    assert sum(whole.pieces.values()) == PARAMETERS[name]
    assert whole.num_bytes == 2 * PARAMETERS[name]
    for tp in (8, 16):
        ranks = rank_shapes(hf_config, tp)
        # Pieces that several ranks hold (norms, KV heads where tp is 16) count once.
        pieces = {key: size for rank in ranks for key, size in rank.pieces.items()}
        assert sum(pieces.values()) == PARAMETERS[name]
        assert len({rank.num_bytes for rank in ranks}) == 1


def test_a_presets_plans_name_what_is_allowed() -> None:
    hf_config = preset_config("llama31_8b")
    family = family_of(hf_config)
    spec = family.parse(hf_config)
    allowed = [tp for tp in range(1, 65) if not family.plan_problems(spec, tp)]
    assert allowed == [1, 2, 4, 8, 16, 32]
    problems = family.plan_problems(spec, 3)
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
    assert [tp for tp in range(1, 20) if not family.plan_problems(spec, tp)] == [1, 3]
