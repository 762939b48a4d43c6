"""SmolLM2's real weights out of its GGUF file, against transformers reading the same file."""

from pathlib import Path

import pytest
import torch

from core.interfaces.control import ModelFiles
from plugins.checkpoints._gguf.source import GGUFSource
from plugins.checkpoints._safetensors.source import SafetensorsSource
from tests.support import smollm2
from tests.support.models import build_model, folder_files, run_model, tp_logits
from tests.support.oracle import TransformersOracle
from tests.support.weights import read_slice

PROMPTS = [[1], [1, 4093, 198, 1780], list(range(100, 164))]


@pytest.fixture(scope="module")
def files() -> ModelFiles:
    return smollm2.files()


def test_every_tensor_is_the_one_transformers_reads(
    files: ModelFiles, smollm2_folder: Path
) -> None:
    """Bit for bit: `smollm2_folder` was written by transformers from the same GGUF file."""
    ours = GGUFSource(files.weight_files[0], torch.bfloat16)
    theirs = SafetensorsSource([str(smollm2_folder / "model.safetensors")])
    assert set(ours.tensors()) == set(theirs.tensors())
    for name, info in theirs.tensors().items():
        assert ours.tensors()[name].shape == info.shape
        expected = read_slice(theirs, name, 0, 0, info.shape[0])
        assert torch.equal(read_slice(ours, name, 0, 0, info.shape[0]).bfloat16(), expected), name


def test_logits_are_those_of_transformers(smollm2_folder: Path) -> None:
    oracle = TransformersOracle(smollm2_folder)
    folder = folder_files(smollm2_folder)
    model = build_model(folder)
    for prompt in PROMPTS:
        expected = oracle.logits(prompt)
        found = run_model(model, prompt)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
    for logits in tp_logits(folder, 3, PROMPTS[-1]):
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)


def test_float32_out_of_the_file_says_the_same(files: ModelFiles, smollm2_folder: Path) -> None:
    """Not rounded to bf16 on the way: close to the rounded weights' answer, not equal."""
    rounded = run_model(build_model(folder_files(smollm2_folder)), PROMPTS[-1])
    exact = run_model(build_model(files), PROMPTS[-1])
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.05 * rounded.norm()


def test_files_are_what_the_preset_says(files: ModelFiles) -> None:
    assert files.weight_format == "gguf"
    assert files.eos_ids == [2]
    assert files.hf_config["dtype"] == "bfloat16"
    assert (Path(files.tokenizer_dir) / "tokenizer.json").exists()
