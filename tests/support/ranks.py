"""Ranks as threads of one process: communicators over shared memory, for tests of sharded code."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from core.interfaces.comm import SOLO, Comms

Result = TypeVar("Result")
TIMEOUT_S = 60.0  # of waiting for the other ranks, one of which may have failed


class _Meeting:
    """Where the ranks of one axis lay down their tensors."""

    def __init__(self, size: int) -> None:
        self.slots: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size)


class ThreadCommunicator:
    """core.interfaces.comm.Communicator between threads; sums in rank order on every rank."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = len(meeting.slots)
        self._meeting = meeting

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._meeting.slots[self.rank] = x.clone()
        self._meeting.barrier.wait(TIMEOUT_S)
        parts = [part for part in self._meeting.slots if part is not None]
        self._meeting.barrier.wait(TIMEOUT_S)  # before anyone lays down the next tensor
        return parts

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat(self._exchange(x), dim)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0).chunk(self.size)[self.rank]

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return x.copy_(self._exchange(x)[source])


def thread_communicators(size: int) -> list[ThreadCommunicator]:
    """One communicator for each of `size` ranks; each belongs to one thread."""
    meeting = _Meeting(size)
    return [ThreadCommunicator(rank, meeting) for rank in range(size)]


def tp_comms(size: int) -> list[Comms]:
    """The tp axis of each of `size` ranks."""
    if size == 1:
        return [SOLO]
    return [Comms({"tp": comm}) for comm in thread_communicators(size)]


def run_ranks(comms: Sequence[Comms], work: Callable[[Comms], Result]) -> list[Result]:
    """The results of `work` on every rank, one thread each."""
    with ThreadPoolExecutor(len(comms)) as pool:
        return list(pool.map(work, comms))
