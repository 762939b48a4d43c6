"""Ranks as threads of one process: communicators over shared memory, for tests of sharded code."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from core.interfaces.comm import SOLO, Comms, Communicator, SoloCommunicator
from core.parallel.plan import AXES, Plan

Result = TypeVar("Result")
TIMEOUT_S = 60.0  # of waiting for the other ranks, one of which may have failed


class _Meeting:
    """Where the ranks of one group lay down what they bring."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)


class ThreadCommunicator:
    """core.interfaces.comm.Communicator between threads; sums in rank order on every rank."""

    capturable = False

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = len(meeting.slots)
        self._meeting = meeting

    def exchange(self, brought: Any) -> list[Any]:
        """What every rank brought, in rank order; nobody may write into it."""
        self._meeting.slots[self.rank] = brought
        self._meeting.barrier.wait(TIMEOUT_S)
        parts = list(self._meeting.slots)
        self._meeting.barrier.wait(TIMEOUT_S)  # before anyone lays down the next
        return parts

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self.exchange(x.clone())).sum(0, dtype=x.dtype)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat(self.exchange(x.clone()), dim)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        assert x.shape[0] % self.size == 0, "rows can't be cut into equal parts"
        total = torch.stack(self.exchange(x.clone())).sum(0, dtype=x.dtype)
        return total.chunk(self.size)[self.rank] if x.shape[0] else total

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        return x.copy_(self.exchange(x.clone())[source])

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Tensor:
        assert sum(send_counts) == x.shape[0], "the counts are of another tensor"
        brought = self.exchange(torch.split(x.clone(), list(send_counts)))
        came = [parts[self.rank] for parts in brought]
        assert [part.shape[0] for part in came] == list(receive_counts), "unexpected counts"
        return torch.cat(came)

    def abort(self) -> None:
        """End the waiting of the other ranks: this one failed."""
        self._meeting.barrier.abort()


def thread_communicators(size: int) -> list[ThreadCommunicator]:
    """One communicator for each of `size` ranks; each belongs to one thread."""
    meeting = _Meeting(size)
    return [ThreadCommunicator(rank, meeting) for rank in range(size)]


def tp_comms(size: int) -> list[Comms]:
    """The tp axis of each of `size` ranks."""
    if size == 1:
        return [SOLO]
    return [Comms({"tp": comm}) for comm in thread_communicators(size)]


def plan_comms(plan: Plan) -> list[Comms]:
    """Every axis of every rank of a plan, as a mesh would connect them."""
    axes: list[dict[str, Communicator]] = [{} for _ in range(plan.world_size)]
    for axis in AXES:
        for members in plan.groups(axis):
            made: Sequence[Communicator] = (
                [SoloCommunicator()] if len(members) == 1 else thread_communicators(len(members))
            )
            for rank, comm in zip(members, made, strict=True):
                axes[rank][axis] = comm
    return [Comms(of_rank) for of_rank in axes]


def run_ranks(comms: Sequence[Comms], work: Callable[[Comms], Result]) -> list[Result]:
    """The results of `work` on every rank, one thread each. Raises what the first rank to fail
    raised; the others wait no longer for it."""

    def run(of_rank: Comms) -> Result:
        try:
            return work(of_rank)
        except BaseException:
            for comm in of_rank.axes.values():
                if isinstance(comm, ThreadCommunicator):
                    comm.abort()
            raise

    with ThreadPoolExecutor(len(comms)) as pool:
        futures = [pool.submit(run, of_rank) for of_rank in comms]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
