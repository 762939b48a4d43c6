"""The contract of comm plugins: every collective, and the bridges that layers use, is plain torch.

    from core.testing.comm import CASES, check, run_backend

    @pytest.fixture(scope="module")
    def ran():
        [registration] = acme_comm.register_comm()
        return run_backend(registration, devices=["cpu"] * 2)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_contract(ran, case):
        check(ran, case)

Ranks are processes, each of which runs all collectives once (`core.testing.comm_rank`) and writes
what it got into a file. What a rank brings is a pure function of (case, rank), so that the right
answers are computed here without any communication. All values are exact in every dtype.
"""

import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from core.plugin.hookspecs import Registration

TIMEOUT_S = 120.0  # of all ranks together, their start included
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int64": torch.int64,
}
# Dtypes that nothing is summed in.
CARRIED = {"float8_e4m3fn": torch.float8_e4m3fn, "uint8": torch.uint8, "bool": torch.bool}
# Rows of rank i for rank j, of as many ranks as there are: uneven, some empty, none at all, and all
# of one rank's to itself.
ALL_TO_ALLS: dict[str, Callable[[int, int], int]] = {
    "all_to_all_uneven": lambda i, j: (3 * i + 2 * j) % 4,
    "all_to_all_to_one": lambda i, j: 5 if j == 0 else 0,
    "all_to_all_from_one": lambda i, j: j + 1 if i == 1 else 0,
    "all_to_all_none": lambda i, j: 0,
    "all_to_all_own": lambda i, j: 2 if i == j else 0,
}
SUMS = ("all_reduce", "all_reduce_strided", "reduce_scatter", "partial-replicated", "partial-rows")
CARRYING = ("all_gather0", "all_gather1", "all_gather-1", "broadcast_first", "broadcast_last")
COPIES = (
    *CARRYING,
    "rows-replicated",
    "columns-replicated",
    "partial-partial",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One result of every rank."""

    name: str  # a collective, or "source-target" of a bridge
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"


CASES = [
    *(Case(name, dtype) for name in (*SUMS, *COPIES) for dtype in DTYPES),
    *(Case(name, dtype) for name in ALL_TO_ALLS for dtype in DTYPES | CARRIED),
    *(Case(name, dtype) for name in CARRYING for dtype in CARRIED),
]


@dataclass(frozen=True, slots=True)
class RankResult:
    """What one rank got, on the CPU."""

    of_case: Mapping[str, Tensor]  # by str(case)
    rounded: Tensor  # bfloat16 (8,): see `check_sums_are_rounded_once`
    # The ranks that it missed once the last one had left; None where that was not tried.
    missed: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Ran:
    """What the ranks of a backend got, and what each wrote to stderr."""

    ranks: Sequence[RankResult]
    stderr: Sequence[str] = ()


def brought(case: Case, rank: int, size: int) -> Tensor:
    """What `rank` brings into a collective that is not all_to_all; into no two the same."""
    return _values((2 * size, 4), case, rank)


def rows_to_send(case: Case, rank: int, size: int) -> tuple[Tensor, list[int]]:
    """What `rank` brings into an all_to_all, and how many rows of it each rank is to get."""
    count = ALL_TO_ALLS[case.name]
    counts = [count(rank, peer) for peer in range(size)]
    return _values((sum(counts), 3), case, rank), counts


def _values(shape: tuple[int, ...], case: Case, rank: int) -> Tensor:
    """Quarters of small integers, whose sums are exact."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case} {rank}".encode()))
    whole = torch.randint(-64, 64, shape, generator=generator)
    if case.dtype in CARRIED:  # no signs, few bits
        return (whole.abs() / 4).clamp(max=8).to(CARRIED[case.dtype])
    return whole if case.dtype == "int64" else (whole / 4).to(DTYPES[case.dtype])


def expected(case: Case, rank: int, size: int) -> Tensor:
    """What `rank` must get, float64."""
    if case.name in ALL_TO_ALLS:
        sent = [rows_to_send(case, peer, size) for peer in range(size)]
        return torch.cat([torch.split(x_TE.double(), counts)[rank] for x_TE, counts in sent])
    x = [brought(case, peer, size).double() for peer in range(size)]
    total = torch.stack(x).sum(0)
    if case.name in ("reduce_scatter", "partial-rows"):
        return total.chunk(size)[rank]
    if case.name == "all_reduce_strided":
        return torch.stack([part.repeat(1, 2)[:, ::2] for part in x]).sum(0)
    if case.name in SUMS:
        return total
    return {
        "all_gather0": lambda: torch.cat(x, 0),
        "all_gather1": lambda: torch.cat(x, 1),
        "all_gather-1": lambda: torch.cat(x, -1),
        "broadcast_first": lambda: x[0],
        "broadcast_last": lambda: x[-1],
        "rows-replicated": lambda: torch.cat(x, 0),
        "columns-replicated": lambda: torch.cat(x, -1),
        "partial-partial": lambda: x[rank],
    }[case.name]()


def check(ran: Ran, case: Case) -> None:
    """Compare what every rank got with plain torch, bit for bit. Raises AssertionError."""
    for rank, result in enumerate(ran.ranks):
        got, want = result.of_case[str(case)], expected(case, rank, len(ran.ranks))
        where = f"{case}, rank {rank}: "
        assert got.dtype == (DTYPES | CARRIED)[case.dtype], where + f"its dtype is {got.dtype}"
        assert got.shape == want.shape, where + f"{tuple(got.shape)} is not {tuple(want.shape)}"
        assert torch.equal(got.double(), want), where + f"{got} is not {want}"


def check_sums_are_rounded_once(ran: Ran) -> None:
    """Sums of 16-bit floats are rounded once, not at each rank: 1 + 2^-8 + 2^-8 is 1 + 2^-7 in
    bfloat16, and added one at a time each half step is lost. Models answer alike on any number of
    ranks that way; NCCL can't. Raises AssertionError."""
    exact = torch.tensor(1.0 + (len(ran.ranks) - 1) * 2.0**-8).bfloat16()
    for rank, result in enumerate(ran.ranks):
        assert (result.rounded == exact).all(), f"rank {rank}: {result.rounded} is not {exact}"


def check_a_lost_rank_is_named(ran: Ran) -> None:
    """For backends that notice by themselves that a peer left (`run_backend(lose_the_last=True)`):
    each rank blames all others and not itself, by `core.cluster.nodes.missing`, from the error of
    its collective. Raises AssertionError."""
    for rank, result in enumerate(ran.ranks[:-1]):
        others = [peer for peer in range(len(ran.ranks)) if peer != rank]
        assert result.missed == others, f"rank {rank} missed {result.missed}, not {others}"


def run_backend(
    registration: Registration,
    devices: Sequence[str],
    *,
    options: Mapping[str, Any] | None = None,
    lose_the_last: bool = False,
) -> Ran:
    """Start a process for each of `devices` ("cpu", "cuda:0"), run all collectives in each, and
    read what they got. The backend's module must be importable here: `sys.path` is theirs as well.

    `options`: of the registration's `config`. `lose_the_last`: the last rank leaves in the end
    while the others wait for it. Raises AssertionError with what the ranks said where one of them
    fails, ValueError where the factory is no "module:attribute".
    """
    if not isinstance(registration.factory, str):
        raise ValueError(f"{registration.factory!r}: ranks are processes, which import a string")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        job = {
            "factory": registration.factory,
            "config": f"{registration.config.__module__}:{registration.config.__qualname__}",
            "options": dict(options or {}),
            "devices": list(devices),
            "folder": made,
            "lose_the_last": lose_the_last,
        }
        processes = [_start(job, rank, folder) for rank in range(len(devices))]
        with ThreadPoolExecutor(len(processes)) as pool:
            try:  # where one fails, the others would wait for it
                futures = [pool.submit(_succeed, process) for process in processes]
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                for process in processes:
                    process.kill()
        stderr = [(folder / f"{rank}.stderr").read_text() for rank in range(len(devices))]
        statuses = [process.returncode for process in processes]
        assert not any(statuses), f"the ranks ended with {statuses}:\n" + "\n".join(stderr)
        return Ran([_read(folder / f"{rank}.safetensors") for rank in range(len(devices))], stderr)


def _start(job: Mapping[str, Any], rank: int, folder: Path) -> "subprocess.Popen[bytes]":
    with (folder / f"{rank}.stderr").open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "core.testing.comm_rank", json.dumps(job), str(rank)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=stderr,
        )


def _succeed(process: "subprocess.Popen[bytes]") -> None:
    status = process.wait(TIMEOUT_S)
    if status:
        raise ChildProcessError(status)


def _read(path: Path) -> RankResult:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        missed = json.loads(file.metadata()["missed"])
    return RankResult(tensors, tensors.pop("rounded"), missed)
