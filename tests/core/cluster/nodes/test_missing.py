"""Errors that come of a peer's end are told from a rank's own. tests/contracts/test_comm.py has
gloo's, as it really raises them."""

import pytest
import torch
import torch.distributed as dist

from core.cluster.nodes.missing import missing_ranks
from core.errors import ModelError, WorkerDied


def test_who_names_its_peers_is_believed() -> None:
    error = WorkerDied("rank 3 can't be reached", ranks=[3])
    assert missing_ranks(error, 0, 4) == (3,)
    wrapped = ModelError("x")
    wrapped.__cause__ = error
    assert missing_ranks(wrapped, 0, 4) == (3,)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        ModelError("no such file"),
        WorkerDied("a process is gone"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("NCCL error: unhandled cuda error, ncclUnhandledCudaError"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_own_errors_blame_nobody(error: Exception) -> None:
    assert missing_ranks(error, 0, 4) == ()


def test_nccl_s_words_for_a_lost_peer() -> None:
    """As NCCL 2.28 puts it (its src/misc and ncclGetErrorString)."""
    text = "NCCL error in: x.cpp:1, remote process exited or there was a network error"
    assert missing_ranks(dist.DistBackendError(text), 1, 3) == (0, 2)


def test_a_store_that_is_gone_is_a_peer_s_end() -> None:
    assert missing_ranks(dist.DistNetworkError("recv failed"), 1, 2) == (0,)
