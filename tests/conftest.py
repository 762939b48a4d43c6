"""What must hold before Triton is imported, and fixtures that several test folders share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

# A test may not depend on the pace of the machine that runs it.
hypothesis.settings.register_profile(
    "any pace", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any pace")

# Without a GPU Triton's kernels run in its interpreter, which is chosen when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.support.selection import leave_out_cases
    from tests.support.workers import place

    leave_out_cases(items)
    items.sort(key=lambda item: place(item.nodeid.partition("::")[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.support.workers import FilesInOrder

    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # it would begin with the files of most tests
    return FilesInOrder(config, log)


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder (bf16 safetensors)."""
    from tests.support import smollm2

    return smollm2.write_folder(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama; copy it before changing it."""
    from tests.support.models import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, by its name in TINY_MODELS; written once a session."""
    from tests.support.models import write_tiny_model

    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = write_tiny_model(tmp_path_factory.mktemp(name), name)
        return folders[name]

    return folder
