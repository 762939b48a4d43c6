"""A cache and a checkpoint of each test's own."""

from pathlib import Path

import pytest

from tests.support.models import write_tiny_model


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NODEWEAVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one's own, to damage."""
    return write_tiny_model(tmp_path / "model", "llama")
