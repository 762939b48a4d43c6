"""Collectives over peers' memory: ranks are processes that map each other's buffers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from plugins.comm._symm_exchange import buffer_bytes
from tests.support.peer_rank import NUM_PROGRAMS, SIZES, SLOT_BYTES, value

ROOT = Path(__file__).parents[3]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(scope="module", params=[2, 3])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, np.ndarray]]:
    """What every rank got, by collective, type and turn."""
    size, folder = request.param, tmp_path_factory.mktemp("peers")
    for rank in range(size):
        (folder / f"{rank}.buffer").write_bytes(bytes(buffer_bytes(size, SLOT_BYTES, NUM_PROGRAMS)))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.peer_rank", str(rank), str(size), str(folder)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
            stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=300)[1].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * size, "\n".join(errors)
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(size)]


def brought(size: int, turn: int, count: int, name: str) -> torch.Tensor:
    return torch.stack([value(rank, turn, count, DTYPES[name]).float() for rank in range(size)])


@pytest.mark.parametrize("name", list(DTYPES))
def test_sums_are_of_all_ranks_and_rounded_once(
    results: list[dict[str, np.ndarray]], name: str
) -> None:
    size, seen = len(results), 0
    for turn, count in enumerate(SIZES):
        total = brought(size, turn, count, name).sum(0).to(DTYPES[name]).float().numpy()
        whole = brought(size, turn, count * size, name).sum(0).to(DTYPES[name]).float()
        for rank, got in enumerate(results):
            if f"reduce/{name}/{turn}" in got:
                np.testing.assert_array_equal(got[f"reduce/{name}/{turn}"], total)
                np.testing.assert_array_equal(got[f"in_two/{name}/{turn}"], total)
                seen += 1
            if f"part/{name}/{turn}" in got:
                np.testing.assert_array_equal(
                    got[f"part/{name}/{turn}"], whole.chunk(size)[rank].numpy()
                )
    assert seen >= 4 * size


@pytest.mark.parametrize("name", list(DTYPES))
def test_gathered_parts_lie_in_rank_order(results: list[dict[str, np.ndarray]], name: str) -> None:
    size, seen = len(results), 0
    for turn, count in enumerate(SIZES):
        parts = brought(size, turn, count, name).numpy()
        for got in results:
            if f"gather/{name}/{turn}" in got:
                np.testing.assert_array_equal(got[f"gather/{name}/{turn}"], parts)
                seen += 1
    assert seen >= 3 * size


def test_what_is_too_large_is_left_to_others(results: list[dict[str, np.ndarray]]) -> None:
    """A slot holds 12 KiB: 6,144 values of bfloat16, not of float32."""
    for got in results:
        assert "reduce/bfloat16/5" in got
        assert "reduce/float32/5" not in got
