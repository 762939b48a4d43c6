"""The moe_a2a contract of symm_mem: ranks are processes that share memory.

On the CPU, in Triton's interpreter, buffers are files. With GPUs that reach each other real ones
are connected, and graphs are replayed.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.testing.moe_a2a import NUM_STEPS, dense, rows_of, tolerance
from tests.contracts import a2a_graph
from tests.contracts.a2a_peer_rank import HIDDEN, cases, file_bytes

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ran:
    """What each rank got, by case and step."""

    size: int
    on_gpu: bool
    ranks: list[dict[str, np.ndarray]]


def run_ranks(size: int, folder: Path, *, on_gpu: bool) -> Ran:
    """Start every rank, wait for all, read their results."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not on_gpu:
        environment["TRITON_INTERPRET"] = "1"
        for rank in range(size):
            with (folder / f"{rank}.buffer").open("wb") as file:
                file.truncate(4 * file_bytes(size))
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.contracts.a2a_peer_rank", str(rank), str(size)),
                *(str(folder), *(["cuda"] if on_gpu else [])),
            ],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=400)[1].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * size, "\n".join(errors)
    return Ran(size, on_gpu, [dict(np.load(folder / f"{rank}.npz")) for rank in range(size)])


@pytest.fixture(
    scope="module",
    params=[pytest.param("interpreter-2", marks=pytest.mark.slow), "interpreter-4", "cuda-2"],
)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    where, _, size = request.param.partition("-")
    overlapping = os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"
    needed = 1 if overlapping else int(size)
    if where == "cuda" and torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} CUDA devices")
    return run_ranks(int(size), tmp_path_factory.mktemp(request.param), on_gpu=where == "cuda")


def test_dispatch_then_combine_is_dense_moe(ran: Ran) -> None:
    checked = 0
    for case, max_rows in cases(ran.size):
        for rank, results in enumerate(ran.ranks):
            for step in range(NUM_STEPS):
                name = f"{case}/{max_rows}/{step}"
                got = torch.from_numpy(results[name])
                rows = rows_of(case, ran.size, rank, step, HIDDEN)
                if case.fp8:
                    rows = replace(rows, x_TE=torch.from_numpy(results[f"{name}/carried"]))
                expected = dense(case, rows)
                try:
                    torch.testing.assert_close(got, expected, **tolerance(case), equal_nan=True)
                except AssertionError as error:
                    raise AssertionError(f"{case}, {max_rows} rows, rank {rank}") from error
                none = (rows.physical_TK < 0).all(1)
                assert (got[none] == 0).all(), "rows without experts get exactly 0"
                checked += len(got)
    assert checked > 60 * ran.size


def test_a_graph_of_layers_replays_other_rows(ran: Ran) -> None:
    if not ran.on_gpu:
        pytest.skip("graphs are of GPUs")
    for name, case in a2a_graph.GRAPH_CASES.items():
        num_experts = case.num_experts + case.redundant
        for rank, results in enumerate(ran.ranks):
            rows = a2a_graph.turns(case, ran.size, rank, HIDDEN)
            assert len(rows) > 3
            for turn, brought in enumerate(rows):
                got = torch.from_numpy(results[f"graph/{name}/{turn}"])
                expected = a2a_graph.layer_by_layer(case, brought, num_experts)
                if len(got) == 0:
                    continue
                error = (got - expected).abs().amax() / expected.abs().amax().clamp(min=1e-3)
                # A value between two fp8 numbers may go the other way in each layer.
                most = 0.15 if case.fp8 else 0.05
                assert error < most, (name, rank, turn)
