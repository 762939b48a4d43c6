"""Collectives without peers: right shapes, dtypes and copies; values are nobody's business."""

import pytest
import torch

from core.errors import ConfigError
from core.interfaces.comm import Comms, StandInBackend
from core.ops.ragged import gather_rows, scatter_rows
from core.parallel.layout import Layout
from core.plugin.hookspecs import NoOptions
from plugins.comm.emulated import EmulatedBackend, EmulatedCommunicator

SIZES = [(0, 2), (1, 2), (3, 4), (0, 16)]


@pytest.fixture(params=SIZES, ids=str)
def comm(request: pytest.FixtureRequest) -> EmulatedCommunicator:
    return EmulatedCommunicator(*request.param)


def test_collectives_return_what_peers_would_in_shape(comm: EmulatedCommunicator) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        x = torch.ones(2 * comm.size, 3).to(dtype)
        assert torch.equal(comm.all_reduce(x), x)
        assert comm.all_gather(x, 0).shape == (2 * comm.size**2, 3)
        assert comm.all_gather(x, -1).shape == (2 * comm.size, 3 * comm.size)
        assert comm.reduce_scatter(x).shape == (2, 3)
        assert torch.equal(comm.broadcast(x.clone(), comm.rank), x)
        other = (comm.rank + 1) % comm.size
        assert torch.equal(comm.broadcast(x.clone(), other), torch.zeros_like(x))
        assert comm.all_gather(x, 0).dtype == comm.reduce_scatter(x).dtype == dtype


def test_what_was_given_is_not_what_comes_back(comm: EmulatedCommunicator) -> None:
    """Copies: the next layer may write into them."""
    x = torch.ones(comm.size, 3)
    comm.all_reduce(x).zero_()
    comm.reduce_scatter(x).zero_()
    assert (x == 1).all()


def test_all_to_all_brings_the_agreed_number_of_rows(comm: EmulatedCommunicator) -> None:
    size = comm.size
    for sent, received in (([2] * size, [3] * size), ([1] * size, [0] * size), ([0] * size, [1])):
        received = (received + [0] * size)[:size]
        x = torch.arange(float(sum(sent))).unsqueeze(1).repeat(1, 5)
        came = comm.all_to_all(x, sent, received)
        assert came.shape == (sum(received), 5)
        assert set(came[:, 0].tolist()) <= {0.0, *x[:, 0].tolist()}


def test_no_rows(comm: EmulatedCommunicator) -> None:
    none = torch.empty(0, 4)
    assert comm.reduce_scatter(none).shape == comm.all_gather(none, 0).shape == (0, 4)
    assert comm.all_to_all(none, [0] * comm.size, [0] * comm.size).shape == (0, 4)


@pytest.mark.parametrize("spread", ["alike", "unlike", "one_has_most"])
def test_ragged_rows_keep_their_numbers(comm: EmulatedCommunicator, spread: str) -> None:
    counts = {
        "alike": [3] * comm.size,
        "unlike": [2 + rank % 2 for rank in range(comm.size)],
        "one_has_most": [40, *[1] * (comm.size - 1)],
    }[spread]
    own = counts[comm.rank]
    gathered = gather_rows(comm, torch.ones(own, 4), counts)
    assert gathered.shape == (sum(counts), 4)
    assert scatter_rows(comm, gathered, counts).shape == (own, 4)


def test_bridges(comm: EmulatedCommunicator) -> None:
    comms = Comms({"tp": comm})
    rows = torch.ones(comm.size, 4)
    part = comms.bridge("tp", src=Layout.PARTIAL, dst=Layout.ROWS)(rows)
    assert part.shape == (1, 4)
    assert comms.bridge("tp", src=Layout.ROWS, dst=Layout.REPLICATED)(part).shape == rows.shape


def test_the_backend_stands_in_and_joins_no_group() -> None:
    backend = EmulatedBackend(NoOptions())
    assert isinstance(backend, StandInBackend)
    comm = backend.stand_in(3, 8)
    assert (comm.rank, comm.size, comm.capturable) == (3, 8, True)
    with pytest.raises(ConfigError, match="set comm=auto"):
        backend.communicator(object())
