"""Rotary tables against transformers' own, for every type and both spellings of a config."""

from typing import Any

import pytest
import torch

from core.errors import ModelError
from core.layers.rope import rope_table
from core.layers.rope_spec import RopeSpec, parse_rope
from tests.support.models import LINEAR_ROPE, LLAMA3_ROPE, TINY, YARN_ROPE

HEAD_DIM = 16
CPU = torch.device("cpu")
FACTORS = [1.0 + 0.5 * i for i in range(HEAD_DIM // 2)]
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": LINEAR_ROPE,
    "llama3": LLAMA3_ROPE,
    "yarn": YARN_ROPE,
    "yarn_mscale": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 16.0},
    "yarn_smooth": YARN_ROPE | {"truncate": False, "attention_factor": 1.25},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": FACTORS,
        "long_factor": FACTORS,
        "attention_factor": 1.0,
        "original_max_position_embeddings": 512,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_table_is_that_of_transformers(case: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**(TINY | {"rope_parameters": dict(CASES[case])}))
    positions = torch.arange(300)
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions[None])
    expected = torch.cat((cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]), -1)
    spec = parse_rope({"rope_parameters": CASES[case]})
    assert torch.equal(rope_table(spec, HEAD_DIM, 300, CPU), expected)


@pytest.mark.parametrize("case", ["default", "linear", "llama3", "yarn"])
def test_old_spelling_means_the_same(case: str) -> None:
    raw = dict(CASES[case])
    theta, kind = raw.pop("rope_theta"), raw.pop("rope_type")
    expected = parse_rope({"rope_parameters": CASES[case]})
    for type_key in ("type", "rope_type"):
        scaling = None if kind == "default" else raw | {type_key: kind}
        assert parse_rope({"rope_theta": theta, "rope_scaling": scaling}) == expected


def test_nothing_said_is_the_default() -> None:
    assert parse_rope({}) == RopeSpec(kind="default", theta=10000.0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic", "llama3", "yarn"]),
        ({"rope_scaling": 3}, ["rope_scaling=3"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters.factor=None", "linear"]),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, ["factor=-1", "above 0"]),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, ["factor='x'"]),
        ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, ["low_freq_factor=4.0"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", "1.0"]),
        (
            {"rope_parameters": CASES["longrope"] | {"long_factor": [2.0] * 8}},
            ["longrope", "short_factor equals"],
        ),
    ],
)
def test_what_is_not_supported_is_named(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as error:
        parse_rope(config)
    assert all(word in str(error.value) for word in words)
