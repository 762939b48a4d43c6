"""The format against Nodeweave's contract of its family, over a small made-up checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from acme_checkpoint import register_checkpoint_format

from core.model_files.byte_tokenizer import byte_tokenizer_dir
from core.testing.checkpoint_format import CASES, Example, check_format

SHAPES = {"vector": (17,), "matrix": (24, 10), "experts": (3, 8, 5), "one": (1, 1)}


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    folder = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.{name}.weight": torch.randn(shape, generator=generator)
        for name, shape in SHAPES.items()
    }
    tensors["model.half.weight"] = torch.randn(6, 4, generator=generator).half()
    (folder / "weights").mkdir()
    for name, tensor in tensors.items():
        np.save(folder / "weights" / f"{name}.npy", tensor.numpy())
    config = {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "eos_token_id": 256}
    (folder / "config.json").write_text(json.dumps(config))
    for file in Path(byte_tokenizer_dir(300)).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return Example(register_checkpoint_format()[0], folder, tensors)


@pytest.mark.parametrize("case", CASES)
def test_it_keeps_the_contract(example: Example, case: str) -> None:
    check_format(example, case)
