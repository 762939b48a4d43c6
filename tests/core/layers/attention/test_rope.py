"""Rotary tables against transformers' own, for every type and both spellings of a config."""

import copy
from typing import Any

import pytest
import torch

from core.errors import ModelError
from core.layers.attention.rope import rope_table
from core.layers.attention.rope_spec import RopeSpec, extended_positions, parse_rope, rope_warnings
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
    "longrope_derived": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": FACTORS,
        "long_factor": FACTORS,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    # The factor is what the context was stretched by, where nothing says it.
    "longrope_stretched": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": FACTORS,
        "long_factor": FACTORS,
        "original_max_position_embeddings": 64,
    },
    "yarn_stretched": YARN_ROPE | {"factor": None},
    "yarn_no_weights": YARN_ROPE | {"mscale": 0, "mscale_all_dim": 0.8, "truncate": None},
    "yarn_original": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
}


# Keys that contradict each other, as transformers settles it.
BOTH: dict[str, dict[str, Any]] = {
    "scaling_counts": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_theta": 20000.0,
    },
    "theta_of_scaling": {"rope_scaling": LINEAR_ROPE | {"rope_theta": 300.0}, "rope_theta": 500.0},
    "empty_scaling": {"rope_parameters": LINEAR_ROPE, "rope_scaling": {}},
    "original_beside": {"rope_scaling": YARN_ROPE, "original_max_position_embeddings": 32},
    "original_beside_llama3": {
        "rope_parameters": LLAMA3_ROPE,
        "original_max_position_embeddings": 32,
    },
}


def expected_table(changes: dict[str, Any]) -> torch.Tensor:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**copy.deepcopy(TINY | changes))
    positions = torch.arange(300)
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions[None])
    return torch.cat((cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]), -1)


@pytest.mark.parametrize("case", CASES)
def test_table_is_that_of_transformers(case: str) -> None:
    changes = {"rope_parameters": CASES[case]}
    spec = parse_rope(TINY | changes)
    assert torch.equal(rope_table(spec, HEAD_DIM, 300, CPU), expected_table(changes))


@pytest.mark.parametrize("case", BOTH)
def test_keys_that_contradict_mean_what_they_mean_to_transformers(case: str) -> None:
    spec = parse_rope(TINY | BOTH[case])
    assert torch.equal(rope_table(spec, HEAD_DIM, 300, CPU), expected_table(BOTH[case]))


def test_both_spellings_that_differ_are_warned_of() -> None:
    (warning,) = rope_warnings(TINY | BOTH["scaling_counts"])
    assert "rope_scaling and rope_parameters" in warning
    assert rope_warnings({"rope_scaling": LINEAR_ROPE, "rope_parameters": LINEAR_ROPE}) == []
    assert rope_warnings({"rope_parameters": YARN_ROPE}) == []


@pytest.mark.parametrize("case", ["default", "linear", "llama3", "yarn", "yarn_smooth"])
@pytest.mark.parametrize("beside", [True, False])
def test_the_table_of_heads_that_turn_in_part_is_that_of_transformers(
    case: str, beside: bool
) -> None:
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    fraction = {"partial_rotary_factor": 0.75}
    changes = {"rope_parameters": CASES[case] | ({} if beside else fraction)}
    if beside:
        changes |= fraction
    config = Glm4MoeConfig(**copy.deepcopy(TINY | changes))
    cos, sin = Glm4MoeRotaryEmbedding(config)(torch.zeros(1), torch.arange(300)[None])
    spec = parse_rope(TINY | changes)
    assert spec.fraction == 0.75
    found = rope_table(spec, 12, 300, CPU)
    assert torch.equal(found, torch.cat((cos[0, :, :6], sin[0, :, :6]), -1))


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        # Qwen's cards: YaRN is added, max_position_embeddings stays.
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 96}, 384),
        ({"type": "yarn", "factor": 4.0}, 512),
        # DeepSeek's: max_position_embeddings says it already.
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"type": "linear", "factor": 2.0}, 256),
        (LLAMA3_ROPE, 128),
        (None, 128),
        ({"type": "yarn", "factor": 1e12}, 1 << 24),
    ],
)
def test_the_context_is_what_the_positions_reach(
    scaling: dict[str, Any] | None, positions: int
) -> None:
    hf_config = {"max_position_embeddings": 128, "rope_scaling": scaling}
    assert extended_positions(parse_rope(hf_config), 128) == positions


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
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, ["factor=1000", "above 0"]),
        ({"rope_scaling": {"type": ["linear"]}}, ["rope_type=['linear']"]),
        ({"rope_theta": "1e4"}, ["rope_theta='1e4'", "above 0"]),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            ["rope_parameters.full_attention", "type of layer"],
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2}, "max_position_embeddings": 1},
            ["original_max_position_embeddings=1", "from 2"],
        ),
        ({"rope_scaling": YARN_ROPE | {"truncate": "no"}}, ["truncate='no'", "true or false"]),
        ({"rope_scaling": YARN_ROPE | {"attention_factor": 0}}, ["attention_factor=0"]),
        ({"partial_rotary_factor": 0}, ["partial_rotary_factor=0 ", "above 0"]),
        ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor=1.5", "at most 1"]),
        (
            {"rope_parameters": {"partial_rotary_factor": True}, "partial_rotary_factor": 0.5},
            ["partial_rotary_factor=True"],
        ),
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
