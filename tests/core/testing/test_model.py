"""The shipped contract of model families finds a family that computes something else.

What such a family would do is done to a copy of the checkpoint, while transformers reads the right
one.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.testing.model import check_model
from tests.support.models import edit_config, write_tiny_model


def other_epsilon(folder: Path) -> None:
    edit_config(folder, rms_norm_eps=1e-2)


def other_rotation(folder: Path) -> None:
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 9000.0})


def no_biases(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    biases = {name: torch.zeros_like(x) for name, x in tensors.items() if name.endswith("bias")}
    assert biases
    save_file(tensors | biases, path)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("right") / "qwen2", "qwen2")


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [other_epsilon, other_rotation, no_biases])
def test_a_family_that_computes_something_else_is_found(right, tmp_path, mistake):
    wrong = shutil.copytree(right, tmp_path / "wrong")
    mistake(wrong)
    with pytest.raises(AssertionError, match="first difference"):
        check_model(wrong, reference=right)


def test_a_right_one_passes(right):
    check_model(right, num_tokens=8)
