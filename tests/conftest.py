"""Fixtures that several test folders share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder (bf16 safetensors)."""
    from tests.support import smollm2

    return smollm2.write_folder(tmp_path_factory.mktemp("smollm2"))
