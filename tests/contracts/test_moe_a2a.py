"""The contract of moe_a2a plugins: dispatch, any experts, combine is dense MoE.

Ranks are threads of this process, and once four processes over gloo. DeepEP is its test double.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from core.testing.moe_a2a import (
    CASES,
    CPU,
    NUM_STEPS,
    Case,
    check_dispatcher,
    check_results,
    rows_of,
)
from tests.contracts import a2a_rank
from tests.contracts.a2a_backends import BACKENDS, WithGroup

ROOT = Path(__file__).parents[2]
# DeepEP carries bfloat16 only: all other cases are run in it, too.
ALL_CASES = list(dict.fromkeys([*CASES, *(replace(case, dtype=torch.bfloat16) for case in CASES)]))
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
RUNS = [
    (name, ep, case, device)
    for name, parameters in BACKENDS.items()
    for device in (DEVICES[:1] if name.startswith("deepep") else DEVICES)  # a double on the CPU
    for ep in parameters.sizes
    for case in (CASES if parameters.can(CASES[0]) else ALL_CASES)
    if parameters.can(case) and (case.num_experts + case.redundant) % ep == 0
]


@pytest.mark.parametrize(("name", "ep", "case", "device"), RUNS, ids=str)
def test_dispatch_then_combine_is_dense_moe(
    name: str, ep: int, case: Case, device: torch.device
) -> None:
    parameters = BACKENDS[name]
    check_dispatcher(
        partial(parameters.make, parameters.options),
        case,
        ep,
        phase=parameters.phase,
        hidden_size=parameters.hidden_size,
        device=device,
        fp8=parameters.fp8,
        wrap=WithGroup if name.startswith("deepep") else lambda comm: comm,
    )


def test_cases_are_what_they_say() -> None:
    """Guards the oracle: routings differ, copies of experts are used, and rows really travel."""
    rows = rows_of(replace(CASES[0], redundant=16), 4, 0, 1, 8)
    assert len(rows.x_TE) > 3
    assert not torch.equal(rows.physical_TK, rows.logical_TK)
    assert all(len(set(row)) == len(row) for row in rows.physical_TK.tolist())
    assert set((rows.physical_TK // 8).flatten().tolist()) == {0, 1, 2, 3}
    padded = rows_of(replace(CASES[0], routing="padded"), 4, 0, 1, 8)
    assert 0 < (padded.physical_TK[:, 0] < 0).sum() < len(padded.x_TE)


Processes = tuple[str, list[dict[str, np.ndarray]]]  # over what, and what each rank got


@pytest.fixture(scope="module", params=[("gloo", 4), ("nccl", 2)], ids=lambda p: f"{p[0]}-{p[1]}")
def processes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Processes:
    """Ranks that are processes."""
    backend, size = request.param
    if backend == "nccl" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA devices")
    folder = tmp_path_factory.mktemp("ranks")
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.contracts.a2a_rank", backend, str(rank), str(size)),
                *(str(folder / "meet"), str(folder / f"{rank}.npz")),
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=200)[1].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * size, "\n".join(errors)
    return backend, [dict(np.load(folder / f"{rank}.npz")) for rank in range(size)]


@pytest.mark.parametrize("case", a2a_rank.CASES, ids=str)
@pytest.mark.parametrize("name", [name for name in BACKENDS if 4 in BACKENDS[name].sizes])
def test_processes_agree_with_dense_moe(processes: Processes, name: str, case: Case) -> None:
    backend, ranks = processes
    if not BACKENDS[name].can(case):
        pytest.skip(f"{name} does not carry {case.dtype}")
    if name not in a2a_rank.dispatchers_over(backend, len(ranks)):
        pytest.skip(f"{name} is not run over {backend}")
    for rank, results in enumerate(ranks):
        got = [torch.from_numpy(results[f"{name}/{case}/{step}"]) for step in range(NUM_STEPS)]
        device = CPU if backend == "gloo" else torch.device("cuda")
        parameters = BACKENDS[name]
        fp8_on = device if case.fp8 and parameters.fp8 else None
        check_results(case, len(ranks), rank, got, parameters.hidden_size, fp8_on=fp8_on)
