"""The contract of comm plugins (core.testing.comm), of the built-in backends."""

from functools import cache

import pytest
import torch

from core.errors import ConfigError
from core.interfaces.comm import SOLO, SoloCommunicator, connect
from core.parallel.layout import Layout
from core.plugin.hookspecs import NoOptions
from core.testing.comm import (
    CASES,
    Case,
    Ran,
    check,
    check_a_lost_rank_is_named,
    check_sums_are_rounded_once,
    run_backend,
)
from plugins.comm import register_comm

REGISTRATIONS = {registration.name: registration for registration in register_comm()}
BACKENDS = {
    "gloo-2": ("gloo", ["cpu"] * 2),
    "gloo-3": ("gloo", ["cpu"] * 3),
    "gloo-cuda-2": ("gloo", ["cuda:0"] * 2),
    "nccl-1": ("nccl", ["cuda:0"]),
    "nccl-2": ("nccl", ["cuda:0", "cuda:1"]),
    "symm_mem-2": ("symm_mem", ["cuda:0", "cuda:1"]),
}


@cache
def run(backend: str) -> Ran:
    name, devices = BACKENDS[backend]
    # Only gloo notices by itself that a rank left.
    return run_backend(REGISTRATIONS[name], devices, lose_the_last=name == "gloo")


@pytest.fixture(scope="module", params=BACKENDS)
def ran(request: pytest.FixtureRequest) -> Ran:
    num_devices = len(set(BACKENDS[request.param][1]) - {"cpu"})
    if torch.cuda.device_count() < num_devices:
        pytest.skip(f"needs {num_devices} CUDA devices")
    return run(request.param)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_collective_and_bridge_is_plain_torch(ran: Ran, case: Case) -> None:
    check(ran, case)


def test_no_rank_warns(ran: Ran) -> None:
    assert not any("Warning" in text for text in ran.stderr), ran.stderr[0]


ON_GLOO = [name for name, (backend, _) in BACKENDS.items() if backend == "gloo"]


@pytest.mark.parametrize("ran", [*ON_GLOO, "symm_mem-2"], indirect=True)
def test_sums_are_rounded_once(ran: Ran) -> None:
    check_sums_are_rounded_once(ran)


@pytest.mark.parametrize("ran", ON_GLOO, indirect=True)
def test_a_lost_rank_is_named(ran: Ran) -> None:
    """As the parent must name the one that ended, not those who found out."""
    check_a_lost_rank_is_named(ran)


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
