"""Two nodes in network namespaces of their own, joined by a link that can be cut.

The same command on both; then everything that can go wrong, with the seconds it takes until it is
known everywhere. `pytest -s` prints them; docs/faults.md holds them.
"""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import write_tiny_model
from tests.support.two_nodes import Network, two_namespaces


@pytest.fixture
def network() -> Iterator[Network]:
    with two_namespaces() as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture
def words(folder: Path) -> list[str]:
    """One rank on each node."""
    return ["+model=custom", f"model.path={folder}", "parallel.tp=2", "cluster.join_timeout_s=30"]


@pytest.fixture(scope="module")
def token() -> str:
    return secrets.token_hex(32)
