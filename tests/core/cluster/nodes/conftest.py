"""Nodes in one process, closed after the test."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.cluster import Cluster


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    made = []

    def make(nnodes: int = 2, **settings: Any) -> Cluster:
        made.append(Cluster(nnodes, **settings))
        return made[-1]

    yield make
    for found in made:
        found.close()
