"""What a config.json may say beside the plain sizes, against transformers: the same checkpoint, the
same tokens, in float32."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import ModelError
from tests.support.models import (
    LINEAR_ROPE,
    YARN_ROPE,
    build_model,
    edit_config,
    folder_files,
    run_model,
)
from tests.support.oracle import TransformersOracle

FACTORS = [1.0 + 0.1 * index for index in range(8)]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "short_factor": FACTORS,
    "long_factor": FACTORS,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 16, "layer_types": None}
PROMPT = torch.randint(256, (200,), generator=torch.Generator().manual_seed(3)).tolist()
# Name -> (tiny checkpoint, changes of its config.json: None takes a key out, MISSING too).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope without attention_factor": ("llama", {"rope_parameters": LONGROPE}),
    "rope_scaling beside rope_parameters": (
        "llama",
        {"rope_parameters": LINEAR_ROPE | {"factor": 8.0}, "rope_scaling": LINEAR_ROPE},
    ),
    "yarn beyond max_position_embeddings": (
        "qwen3",
        {
            "max_position_embeddings": 64,
            "rope_parameters": YARN_ROPE | {"original_max_position_embeddings": 64},
        },
    ),
    "Mixtral's own rms_norm_eps": ("mixtral", {"rms_norm_eps": None}),
    "Mixtral's own theta": ("mixtral", {"rope_parameters": None}),
    "a window that holds the context": ("mistral", {"sliding_window": 512}),
    "a window that is as long as the prompt": (
        "mistral",
        {"sliding_window": 200, "max_position_embeddings": 200},
    ),
    "windows from a layer that is not there": ("qwen2", WINDOWS | {"max_window_layers": 3}),
    "windows that layer_types doesn't name": (
        "qwen3",
        WINDOWS | {"max_window_layers": 0, "layer_types": ["full_attention"] * 3},
    ),
    "GLM's own half of a head": ("glm4_moe", {"rope_parameters": None}),
    "a quarter of a head": ("glm4_moe", {"rope_parameters": None, "partial_rotary_factor": 0.25}),
    "the whole head": ("glm4_moe", {"rope_parameters": None, "partial_rotary_factor": 1.0}),
    "a window that nobody uses": ("qwen3_moe", {"sliding_window": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_config_means_what_it_means_to_transformers(
    case: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    name, changes = CASES[case]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(name), folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    expected = TransformersOracle(folder).logits(PROMPT)
    found = run_model(build_model(folder_files(folder)), PROMPT)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    if case == "Mixtral's own rms_norm_eps":  # 1e-6, which others mean, would be told apart
        config["rms_norm_eps"] = 1e-2
        (folder / "config.json").write_text(json.dumps(config))
        assert not torch.equal(run_model(build_model(folder_files(folder)), PROMPT), found)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_layers_that_draft_tokens_are_not_read(
    name: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(name), folder)
    weights = load_file(folder / "model.safetensors")
    last = "model.layers.2."
    drafts = {
        key.replace(last, "model.layers.3."): value.clone()
        for key, value in weights.items()
        if key.startswith(last)
    }
    drafts |= {
        f"model.layers.3.{name}.weight": torch.full((96, 4), torch.nan)
        for name in ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.head")
    }
    save_file(weights | drafts, folder / "model.safetensors")
    edit_config(folder, num_nextn_predict_layers=1)
    found = run_model(build_model(folder_files(folder)), PROMPT)
    assert torch.equal(found, run_model(build_model(folder_files(tiny_folder(name))), PROMPT))
    edit_config(folder, num_nextn_predict_layers=0, num_mtp_layers=None)
    with pytest.raises(ModelError, match=r"not part of the model.*model\.layers\.3\."):
        build_model(folder_files(folder))
