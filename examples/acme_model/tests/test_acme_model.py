"""The family against Nodeweave's contract: answers are those of transformers, on several plans."""

from pathlib import Path

import pytest
import torch
from transformers import SeedOssConfig, SeedOssForCausalLM

from core.testing.model import TINY, check_model, write_checkpoint

# Like Seed-OSS (biases of q, k and v), and with what else a config.json of its kind may say.
CONFIGS = {
    "seed_oss": TINY,
    "biased": TINY | {"attention_out_bias": True, "mlp_bias": True},
    "unbiased": TINY | {"attention_bias": False, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = SeedOssForCausalLM(SeedOssConfig(**CONFIGS[request.param]))
    return write_checkpoint(model, tmp_path_factory.mktemp("seed_oss"))


@pytest.mark.parametrize("parallel", ["tp1", "tp2"])
def test_its_answers_are_those_of_transformers(folder: Path, parallel: str) -> None:
    check_model(folder, parallel=parallel)
