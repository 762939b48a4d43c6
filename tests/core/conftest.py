"""Tiny checkpoints, written once a session."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.models import write_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint, by its name in TINY_MODELS."""
    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = write_tiny_model(tmp_path_factory.mktemp(name), name)
        return folders[name]

    return folder
