"""The contract of comm plugins: every collective and bridge, against plain torch.

All ranks of a backend run once (`comm_rank.py`) and write their results to files.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.errors import ConfigError
from core.interfaces.comm import SOLO, SoloCommunicator, connect
from core.parallel.layout import Layout
from core.plugin.hookspecs import NoOptions
from tests.contracts.comm_rank import ALL_TO_ALLS, CARRIED, DTYPES, rows_to_send, value

ROOT = Path(__file__).parents[2]
CASES = [("gloo", 2), ("gloo", 3), ("gloo-cuda", 2), ("nccl", 1), ("nccl", 2), ("symm_mem", 2)]


@dataclass(frozen=True)
class Ran:
    """What each rank of a backend got, by name of the result."""

    backend: str
    size: int
    ranks: list[dict[str, np.ndarray]]
    dtypes: dict[str, str]
    missing: list[str]  # ranks that each but the last one missed, once that one had left


def run_ranks(backend: str, size: int, folder: Path) -> Ran:
    """Start every rank, wait for all, read their results."""
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.contracts.comm_rank", backend, str(rank)),
                *(str(size), str(folder / "meet"), str(folder / f"{rank}.npz")),
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n".join(errors)
    assert not any("Warning" in error for error in errors), errors[0]
    dtypes = dict(line.split() for line in (folder / "0.npz.dtypes").read_text().splitlines())
    ranks = [dict(np.load(folder / f"{rank}.npz")) for rank in range(size)]
    missing = [path.read_text() for path in sorted(folder.glob("meet.missing*"))]
    return Ran(backend, size, ranks, dtypes, missing)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    backend, size = request.param
    num_devices = {"gloo": 0, "gloo-cuda": 1, "nccl": size, "symm_mem": size}[backend]
    if torch.cuda.device_count() < num_devices:
        pytest.skip(f"needs {num_devices} CUDA devices")
    return run_ranks(backend, size, tmp_path_factory.mktemp(f"{backend}{size}"))


def inputs(size: int, dtype: str) -> list[Tensor]:
    return [value((6, 4), rank, DTYPES[dtype]).double() for rank in range(size)]


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_collectives_and_bridges_agree_with_plain_torch(ran: Ran, dtype: str) -> None:
    size = ran.size
    x = inputs(size, dtype)
    total = torch.stack(x).sum(0)
    for rank, got in enumerate(ran.ranks):
        rows = total.chunk(size)[rank]
        expected = {
            "all_reduce": total,
            "all_reduce_strided": torch.stack([v.repeat(1, 2)[:, ::2] for v in x]).sum(0),
            "all_gather0": torch.cat(x, 0),
            "all_gather1": torch.cat(x, 1),
            "all_gather-1": torch.cat(x, -1),
            "reduce_scatter": rows,
            "broadcast0": x[0],
            f"broadcast{size - 1}": x[-1],
            "partial-replicated": total,
            "partial-rows": rows,
            "rows-replicated": torch.cat(x, 0),
            "columns-replicated": torch.cat(x, 1),
            "partial-partial": x[rank],
        }
        names = {key.split("/")[1] for key in got if key.startswith(f"{dtype}/")}
        assert {name for name in names if not name.startswith("all_to_all")} == set(expected)
        for name, want in expected.items():
            np.testing.assert_array_equal(got[f"{dtype}/{name}"], want.numpy(), err_msg=name)


@pytest.mark.parametrize("case", list(ALL_TO_ALLS))
@pytest.mark.parametrize("dtype", [*DTYPES, *CARRIED])
def test_all_to_all_brings_each_rank_its_rows_in_order(ran: Ran, dtype: str, case: str) -> None:
    size = ran.size
    sent = [rows_to_send(case, rank, size, (DTYPES | CARRIED)[dtype]) for rank in range(size)]
    parts = [x_TE.double().split(counts) for x_TE, counts in sent]
    for rank, got in enumerate(ran.ranks):
        want = torch.cat([from_rank[rank] for from_rank in parts])
        np.testing.assert_array_equal(got[f"{dtype}/all_to_all_{case}"], want.numpy())


@pytest.mark.parametrize("dtype", list(CARRIED))
def test_dtypes_that_are_only_carried_arrive_unchanged(ran: Ran, dtype: str) -> None:
    x = [value((4, 3), r, torch.float32).abs().to(CARRIED[dtype]).double() for r in range(ran.size)]
    for got in ran.ranks:
        np.testing.assert_array_equal(got[f"{dtype}/all_gather0"], torch.cat(x).numpy())
        np.testing.assert_array_equal(got[f"{dtype}/broadcast0"], x[0].numpy())


def test_results_keep_their_dtype(ran: Ran) -> None:
    assert len(ran.dtypes) > len(DTYPES)
    for name, dtype in ran.dtypes.items():
        assert dtype == name.split("/")[0].removesuffix("_rounding"), name


def test_bfloat16_sums_are_rounded_once(ran: Ran) -> None:
    """1 + 2^-8 + 2^-8 is 1 + 2^-7 in bfloat16; added one at a time each half step is lost."""
    if ran.backend == "nccl":
        pytest.skip("NCCL sums in the dtype it is given")
    exact = torch.tensor(1.0 + (ran.size - 1) * 2.0**-8)
    for got in ran.ranks:
        np.testing.assert_array_equal(got["bfloat16_rounding"], float(exact.bfloat16()))


def test_ranks_whose_peer_left_know_that_it_is_not_their_own_fault(ran: Ran) -> None:
    """As the parent must name the one that ended, not those who found out."""
    if not ran.backend.startswith("gloo"):
        pytest.skip("only gloo notices by itself")
    others = [tuple(p for p in range(ran.size) if p != rank) for rank in range(ran.size - 1)]
    assert ran.missing == [str(ranks) for ranks in others]


def test_an_axis_without_peers_gives_the_identity() -> None:
    x = torch.arange(6.0).reshape(3, 2)
    for comm in (SoloCommunicator(), *SOLO.axes.values()):
        assert (comm.rank, comm.size) == (0, 1)
        for y in (
            comm.all_reduce(x),
            comm.all_gather(x, 1),
            comm.reduce_scatter(x),
            comm.broadcast(x, 0),
            comm.all_to_all(x, [3], [3]),
        ):
            assert y is x
    comms = connect({"tp": None}, {})
    assert comms.bridge("tp", src=Layout.PARTIAL, dst=Layout.ROWS)(x) is x


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_nccl_without_cuda_is_refused_by_name() -> None:
    from plugins.comm.nccl import NcclBackend

    with pytest.raises(ConfigError, match=r"comm.tp=nccl needs a CUDA device.*comm.tp=gloo"):
        NcclBackend(NoOptions())
