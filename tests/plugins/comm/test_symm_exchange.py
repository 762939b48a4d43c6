"""Collectives over peers' memory: ranks are processes that map each other's buffers."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.hopper import run_for_hopper
from tests.support.peer_rank import DTYPES, EPS, NORMS, NormCase, norm_inputs, sizes_of, value

ROOT = Path(__file__).parents[3]
NUM_RANKS = (2, 3, 4, 8)
Results = list[dict[str, np.ndarray]]  # by rank: what it got, by collective, type and turn


def run_ranks(device: str, folder: Path, sizes: tuple[int, ...]) -> Path:
    """Where all ranks of each number of them left their results."""
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    subprocess.run(
        [sys.executable, "-m", "tests.support.peer_rank", device, str(folder), *map(str, sizes)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | interpreted,
        timeout=300,
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On the CPU, whatever numbers of them."""
    return run_ranks("cpu", tmp_path_factory.mktemp("peers"), NUM_RANKS)


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two, where there are as many GPUs or one may be shared."""
    sharing = os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"
    if torch.cuda.device_count() < (1 if sharing else 2):
        pytest.skip("needs 2 CUDA devices")
    return run_ranks("cuda", tmp_path_factory.mktemp("gpus"), (2,))


@pytest.fixture(params=[*(("cpu", size) for size in NUM_RANKS), ("cuda", 2)], ids=str)
def results(request: pytest.FixtureRequest) -> Results:
    device, size = request.param
    folder = request.getfixturevalue("interpreted" if device == "cpu" else "on_gpus")
    return [dict(np.load(folder / f"{size}" / f"{rank}.npz")) for rank in range(size)]


def brought(size: int, turn: int, count: int, name: str) -> torch.Tensor:
    return torch.stack([value(rank, turn, count, DTYPES[name]).float() for rank in range(size)])


@pytest.mark.parametrize("name", list(DTYPES))
def test_sums_are_of_all_ranks_and_rounded_once(results: Results, name: str) -> None:
    size, seen = len(results), 0
    for turn, count in enumerate(sizes_of(size)):
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
    assert seen >= (4 if size == 2 else 1) * size


@pytest.mark.parametrize("name", list(DTYPES))
def test_gathered_parts_lie_in_rank_order(results: Results, name: str) -> None:
    size, seen = len(results), 0
    for turn, count in enumerate(sizes_of(size)):
        parts = brought(size, turn, count, name).numpy()
        for got in results:
            if f"gather/{name}/{turn}" in got:
                np.testing.assert_array_equal(got[f"gather/{name}/{turn}"], parts)
                seen += 1
    assert seen >= (3 if size == 2 else 1) * size


def test_what_is_too_large_is_left_to_others(results: Results) -> None:
    """A slot holds 12 KiB: 6,144 values of bfloat16, not of float32."""
    last = len(sizes_of(len(results))) - 1
    for got in results:
        assert f"reduce/bfloat16/{last}" in got
        assert f"reduce/float32/{last}" not in got


@pytest.mark.parametrize("case", NORMS, ids=lambda case: case.name)
def test_a_sum_with_its_norm_is_bit_for_bit_one_after_the_other(
    results: Results, case: NormCase, request: pytest.FixtureRequest
) -> None:
    """A GPU adds up squares in another order, as it has other numbers of threads for them."""
    size, on_gpu = len(results), "cuda" in request.node.name
    parts, residuals, weights = zip(*(norm_inputs(case, r) for r in range(size)), strict=True)
    total = torch.zeros(case.rows, case.size)
    for part in parts:  # in rank order
        total += part.float()
    added = total.to(DTYPES[case.dtype]).float() + residuals[0].float()
    residual = added.to(DTYPES[case.residual]).float()
    norm = torch.nn.functional.rms_norm(residual, (case.size,), weights[0].float(), EPS)
    tolerance = {"bfloat16": 2**-7, "float32": 2e-6}[case.dtype]
    for got in results:
        np.testing.assert_array_equal(got[f"fused/residual/{case.name}"], residual.numpy())
        for what in ("residual",) if on_gpu else ("norm", "residual"):
            np.testing.assert_array_equal(
                got[f"fused/{what}/{case.name}"], got[f"apart/{what}/{case.name}"]
            )
        np.testing.assert_array_equal(
            got[f"fused/norm/{case.name}"], results[0][f"fused/norm/{case.name}"]
        )
        np.testing.assert_allclose(
            got[f"fused/norm/{case.name}"], norm.numpy(), rtol=tolerance, atol=tolerance
        )


HOPPER = """
from core.gpu_tools.compile_ahead import rehearsal
from core.gpu_tools.peer_memory import PeerMemory
from plugins.comm._symm_exchange import PeerExchange
from plugins.comm._symm_norm import PeerNorm

with rehearsal(CPU, lambda *_: None, 2):
    for size in (2, 3):
        epochs = torch.zeros(128, dtype=torch.int32)
        memory = PeerMemory(1, size, epochs, torch.zeros(size).long(), epochs)
        x = torch.zeros(16, 4096, dtype=torch.bfloat16)
        PeerExchange(memory, 1 << 22).reduce(x)
        x = torch.zeros(3, 7168, dtype=torch.bfloat16)
        PeerNorm(memory, 1 << 21)(x, x.clone(), x[0], 1e-5)
print("compiled")
"""


def test_launches_compile_for_hopper(tmp_path: Path) -> None:
    assert run_for_hopper(HOPPER, tmp_path).endswith("compiled\n")
