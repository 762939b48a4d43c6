"""Random checkpoints: whole for transformers and for us, the same everywhere, written once."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.errors import ConfigError, ModelError
from core.settings.compose import compose, parse_overrides
from core.settings.config import ModelConfig, RandomCheckpoint
from core.sources import random_checkpoint
from core.sources.files import resolve_files
from core.sources.random_checkpoint import random_checkpoint_dir
from tests.support.formats import FILE_PLUGINS
from tests.support.models import build_model, ignore_progress, run_model
from tests.support.oracle import TransformersOracle

PRESETS = ("deepseek_v3_tiny", "qwen3_moe_tiny")
# Of model.safetensors: nodes compare their files, which may not depend on where they are written.
HASHES = {
    "deepseek_v3_tiny": "a99c89761ef4f2e4c4542bee2c9dcac04865fabdecb31fbd70411dcf8d26da6e",
    "qwen3_moe_tiny": "ee570903ac95726ade400f299a3cd34fd7434335b07b0d3b4c13a35886a4c7c6",
}
PROMPT = torch.randint(257, (120,), generator=torch.Generator().manual_seed(3)).tolist()


def preset(name: str) -> ModelConfig:
    return compose(parse_overrides([f"+model={name}"])).model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint of each preset, freshly written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODEWEAVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {name: random_checkpoint_dir(preset(name)) for name in PRESETS}


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_finds_every_tensor_and_no_other(folders: dict[str, Path], name: str) -> None:
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(folders[name], output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("name", PRESETS)
def test_logits_are_those_of_transformers_and_no_ties(folders: dict[str, Path], name: str) -> None:
    expected = TransformersOracle(folders[name]).logits(PROMPT)
    files = resolve_files(
        ModelConfig(name=name, path=str(folders[name])), FILE_PLUGINS, ignore_progress
    )
    found = run_model(build_model(files), PROMPT)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    first, second = expected.topk(2, dim=-1).values.unbind(-1)
    assert (first - second).min() > 1e-3
    assert expected.argmax(-1).unique().numel() > 30
    assert files.eos_ids == [256]


@pytest.mark.parametrize("name", PRESETS)
def test_contents_are_the_same_everywhere(folders: dict[str, Path], name: str) -> None:
    content = (folders[name] / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == HASHES[name]


def test_nothing_is_left_at_0_or_1(folders: dict[str, Path]) -> None:
    tensors = load_file(folders["deepseek_v3_tiny"] / "model.safetensors")
    bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert 0.1 < bias.std() < 0.3
    norm = tensors["model.layers.2.input_layernorm.weight"]
    assert 0.9 < norm.mean() < 1.1
    assert norm.std() > 0.1
    matrix = tensors["model.layers.0.mlp.up_proj.weight"]
    assert matrix.std() == pytest.approx(0.2, rel=0.05)
    assert abs(matrix.mean()) < 0.01
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len({tensor.flatten()[0].item() for tensor in tensors.values()}) == len(tensors)


def test_a_checkpoint_is_written_once_and_by_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folders: dict[str, Path]
) -> None:
    model = preset("qwen3_moe_tiny")
    monkeypatch.setenv("NODEWEAVE_CACHE", str(tmp_path))
    orders: list[Any] = []

    def write(order: Any) -> None:
        orders.append(order)
        Path(order.folder).mkdir()

    monkeypatch.setattr(random_checkpoint, "_run_writer", write)
    first = random_checkpoint_dir(model)
    assert random_checkpoint_dir(model) == first
    assert first.name == folders["qwen3_moe_tiny"].name  # wherever the cache is
    model.random_checkpoint = RandomCheckpoint(seed=1)
    assert random_checkpoint_dir(model) != first
    assert [order.seed for order in orders] == [0, 1]
    assert orders[0].family == "Qwen3MoeForCausalLM"


def test_finding_a_written_checkpoint_imports_no_torch(folders: dict[str, Path]) -> None:
    cache = folders["qwen3_moe_tiny"].parent.parent
    script = """
import sys
from core.settings.compose import compose, parse_overrides
from core.sources.files import resolve_files
from tests.support.formats import FILE_PLUGINS
model = compose(parse_overrides(["+model=qwen3_moe_tiny"])).model
files = resolve_files(model, FILE_PLUGINS, print)
assert files.weight_format == "safetensors"
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    environment = {"NODEWEAVE_CACHE": str(cache), "PATH": ""}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=environment)


def changed(**changes: Any) -> ModelConfig:
    model = preset("qwen3_moe_tiny")
    assert model.shape is not None
    model.shape = model.shape | changes
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (changed(vocab_size=200_000_000), ["GB of random weights", "load_format=dummy"]),
        (changed(architectures=["NoSuchModel"]), ["NoSuchModel", "Qwen3MoeForCausalLM"]),
        (changed(num_experts=3), ["num_experts_per_tok=4", "3 experts"]),
        (
            changed(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
            ["quantised weights", "shape.quantization_config"],
        ),
    ],
)
def test_what_can_not_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: ModelConfig, words: list[str]
) -> None:
    monkeypatch.setenv("NODEWEAVE_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"model\.random_checkpoint") as error:
        random_checkpoint_dir(model)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "Traceback" not in str(error.value)


def test_settings_that_contradict_are_named() -> None:
    model = preset("qwen3_moe_tiny")
    model.shape = None
    with pytest.raises(ConfigError, match=r"model\.shape"):
        resolve_files(model, FILE_PLUGINS, ignore_progress)
    with pytest.raises(ConfigError, match=r"architectures=None"):
        resolve_files(changed(architectures=None), FILE_PLUGINS, ignore_progress)
    model.path = "/somewhere"
    with pytest.raises(ConfigError, match=r"model\.path=.* and model\.random_checkpoint=.* both"):
        resolve_files(model, FILE_PLUGINS, ignore_progress)
    with pytest.raises(ConfigError, match=r"model\.random_checkpoint\.seed=-1"):
        RandomCheckpoint(seed=-1)
