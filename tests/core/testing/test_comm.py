"""The shipped contract of comm backends finds what is wrong with one.

Broken ones are wrapped around communicators of threads, which need no processes; those that are
processes are in tests/contracts/test_comm.py.
"""

from dataclasses import replace

import pytest
import torch

from core.interfaces.comm import Comms
from core.parallel.plan import Plan
from core.plugin.hookspecs import Registration
from core.testing.comm import (
    CASES,
    Case,
    Ran,
    check,
    check_a_lost_rank_is_named,
    check_sums_are_rounded_once,
    run_backend,
)
from core.testing.comm_rank import collect
from core.testing.ranks import ThreadCommunicator, plan_comms, run_ranks


def ran_with(wrap, size=2):
    def work(comms):
        tp = comms.axes["tp"]
        wrapped = Comms({**comms.axes, "tp": wrap(tp)})
        return collect(wrapped, tp.rank, tp.size, torch.device("cpu"))

    return Ran(run_ranks(plan_comms(Plan(tp_attn=size, tp_expert=size)), work))


def failing(ran):
    found = []
    for case in CASES:
        try:
            check(ran, case)
        except AssertionError:
            found.append(case)
    return found


class Broken:
    """A right communicator behind a mistake."""

    def __init__(self, comm: ThreadCommunicator):
        self._comm = comm
        self.rank, self.size, self.capturable = comm.rank, comm.size, False

    def all_reduce(self, x):
        return self._comm.all_reduce(x)

    def all_gather(self, x, dim):
        return self._comm.all_gather(x, dim)

    def reduce_scatter(self, x):
        return self._comm.reduce_scatter(x)

    def broadcast(self, x, source):
        return self._comm.broadcast(x, source)

    def all_to_all(self, x, send_counts, receive_counts):
        return self._comm.all_to_all(x, send_counts, receive_counts)


class TakesTheLargest(Broken):
    def all_reduce(self, x):
        return torch.stack(self._comm.exchange(x.clone())).amax(0)


class Averages(Broken):
    def reduce_scatter(self, x):
        return (super().reduce_scatter(x) / self.size).to(x.dtype)


class SumsInFloat32(Broken):
    """int64 keeps more bits, and results their dtype."""

    def all_reduce(self, x):
        return super().all_reduce(x.float())


class GathersInAnotherOrder(Broken):
    def all_gather(self, x, dim):
        return torch.cat(self._comm.exchange(x.clone())[::-1], dim)


class GathersRowsOnly(Broken):
    def all_gather(self, x, dim):
        rows = super().all_gather(x, 0)
        return rows if dim == 0 or not len(x) else rows.reshape(x.shape[0], -1)


class ScattersTheNextPart(Broken):
    def reduce_scatter(self, x):
        return super().all_reduce(x).roll(1, 0).chunk(self.size)[self.rank]


class AlwaysBroadcastsTheFirst(Broken):
    def broadcast(self, x, source):
        return super().broadcast(x, 0)


class ReadsMemoryAsIfContiguous(Broken):
    def all_reduce(self, x):
        x = x if x.is_contiguous() else torch.as_strided(x, x.shape, (x.shape[1], 1))
        return super().all_reduce(x)


class KeepsOneBuffer(Broken):
    """The result of each call lies where that of the next will."""

    def __init__(self, comm):
        super().__init__(comm)
        self._buffers = {}

    def all_gather(self, x, dim):
        got = super().all_gather(x, dim)
        return self._buffers.setdefault((got.shape, got.dtype), got).copy_(got)


SILENT = Broken.__subclasses__()


class SumsIntoItsArgument(Broken):
    def reduce_scatter(self, x):
        return x.copy_(super().all_reduce(x)).chunk(self.size)[self.rank]


class GathersIntoItsArgument(Broken):
    def all_gather(self, x, dim):
        got = super().all_gather(x, dim)
        x.zero_()
        return got


class BroadcastsIntoANewTensor(Broken):
    def broadcast(self, x, source):
        return super().broadcast(x.clone(), source)


class ReversesSenders(Broken):
    def all_to_all(self, x, send_counts, receive_counts):
        got = super().all_to_all(x, send_counts, receive_counts)
        return torch.cat(got.split(list(receive_counts))[::-1])


class SendsRowsOfTwoDimensionsOnly(Broken):
    def all_to_all(self, x, send_counts, receive_counts):
        got = super().all_to_all(x, send_counts, receive_counts)
        return got if x.dim() == 2 else got.flip(0)


LOUD = Broken.__subclasses__()[len(SILENT) :]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_right_one_passes(size):
    ran = ran_with(Broken, size)
    assert failing(ran) == []
    check_sums_are_rounded_once(ran)


@pytest.mark.parametrize("broken", SILENT)
def test_wrong_results_are_found(broken):
    assert failing(ran_with(broken)) != []


@pytest.mark.parametrize("broken", LOUD)
def test_arguments_that_change_and_odd_shapes_are_found(broken):
    with pytest.raises(AssertionError, match=r"argument|one-dimensional"):
        ran_with(broken)


def test_a_mistake_is_told_with_its_case_and_rank():
    with pytest.raises(AssertionError, match=r"^all_gather0-float16, rank 0: tensor"):
        check(ran_with(GathersInAnotherOrder), Case("all_gather0", "float16"))


def test_sums_that_are_rounded_at_every_rank_are_found():
    class RoundsEach(Broken):
        def all_reduce(self, x):
            parts = self._comm.exchange(x.clone())
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            return total

    ran = ran_with(RoundsEach, 3)
    assert failing(ran) == []
    with pytest.raises(AssertionError, match="rank 0"):
        check_sums_are_rounded_once(ran)


def test_blaming_oneself_for_a_lost_rank_is_found():
    ran = ran_with(Broken)
    first, last = ran.ranks
    check_a_lost_rank_is_named(Ran([replace(first, missed=[1]), last]))
    for missed in ([0], [], None):
        with pytest.raises(AssertionError, match="rank 0 missed"):
            check_a_lost_rank_is_named(Ran([replace(first, missed=missed), last]))


def test_ranks_that_fail_are_told_with_what_they_said():
    missing = Registration(name="acme", factory="core.testing.comm_rank:NoSuchBackend")
    with pytest.raises(AssertionError, match=r"has no attribute 'NoSuchBackend'"):
        run_backend(missing, devices=["cpu"])
    with pytest.raises(ValueError, match="import a string"):
        run_backend(Registration(name="acme", factory=object), devices=["cpu"])


def test_cases_differ():
    assert len({str(case) for case in CASES}) == len(CASES)
