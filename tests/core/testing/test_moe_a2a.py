"""The shipped contract of dispatchers finds what is wrong with one, whatever that is."""

from dataclasses import replace

import pytest
import torch

from core.interfaces.moe_a2a import Routes
from core.plugin.hookspecs import NoOptions
from core.testing.moe_a2a import CASES, DEFAULT, check_dispatcher
from plugins.moe_a2a._options import AllGatherOptions
from plugins.moe_a2a.allgather import AllGatherDispatcher
from plugins.moe_a2a.local import LocalDispatcher


def right(spec):
    return AllGatherDispatcher(AllGatherOptions(), spec)


EQUAL = replace(DEFAULT, counts="equal")  # steps of one shape: stale buffers fit


class Broken:
    """A right dispatcher behind a mistake."""

    def __init__(self, spec):
        self._inner = right(spec)
        self._spec = spec
        self.layout, self.capturable = self._inner.layout, self._inner.capturable

    def dispatch(self, x_TE, experts_TK, weights_TK, counts):
        return self._inner.dispatch(x_TE, experts_TK, weights_TK, counts)

    def combine(self, output, dispatched):
        return self._inner.combine(output, dispatched)


class ForgetsWeights(Broken):
    def dispatch(self, x_TE, experts_TK, weights_TK, counts):
        return super().dispatch(x_TE, experts_TK, torch.ones_like(weights_TK), counts)


class ForgetsOtherRanks(Broken):
    def dispatch(self, x_TE, experts_TK, weights_TK, counts):
        local = experts_TK // self._spec.num_local_experts == self._spec.comm.rank
        return super().dispatch(x_TE, torch.where(local, experts_TK, -1), weights_TK, counts)


class NextExpert(Broken):
    def dispatch(self, x_TE, experts_TK, weights_TK, counts):
        got = super().dispatch(x_TE, experts_TK, weights_TK, counts)
        routes = Routes((got.routes.experts_TK - 1).clamp(min=-1), got.routes.weights_TK)
        return replace(got, routes=routes)


class ReversesRows(Broken):
    def combine(self, output, dispatched):
        return super().combine(output, dispatched).flip(0)


class WritesIntoItsArgument(Broken):
    def dispatch(self, x_TE, experts_TK, weights_TK, counts):
        got = super().dispatch(x_TE.clone(), experts_TK, weights_TK, counts)
        x_TE.zero_()
        return got


class RoundsTwice(Broken):
    def combine(self, output, dispatched):
        return super().combine(output, dispatched).to(torch.bfloat16).to(self._spec.dtype)


class KeepsTheFirstRoutes(Broken):
    """Right in the first step, stale in the next."""

    _kept = None

    def dispatch(self, x_TE, experts_TK, weights_TK, counts):
        got = super().dispatch(x_TE, experts_TK, weights_TK, counts)
        self._kept = self._kept or got.routes
        same = self._kept.experts_TK.shape == got.routes.experts_TK.shape
        return replace(got, routes=self._kept) if same else got


class KeepsTheFirstRows(Broken):
    _kept = None

    def dispatch(self, x_TE, experts_TK, weights_TK, counts):
        got = super().dispatch(x_TE, experts_TK, weights_TK, counts)
        self._kept = got.hidden if self._kept is None else self._kept
        return replace(got, hidden=self._kept) if self._kept.shape == got.hidden.shape else got


class SumsTheOwnRankOnly(Broken):
    def combine(self, output, dispatched):
        other = output if self._spec.comm.rank == 0 else torch.zeros_like(output)
        return super().combine(other, dispatched)


class OtherDtype(Broken):
    def combine(self, output, dispatched):
        return super().combine(output, dispatched).double()


def test_a_right_one_passes():
    check_dispatcher(right, DEFAULT, 2)
    check_dispatcher(lambda spec: LocalDispatcher(NoOptions(), spec), DEFAULT, 1)


@pytest.mark.parametrize("broken", Broken.__subclasses__())
def test_a_broken_one_is_found(broken):
    with pytest.raises(AssertionError):
        check_dispatcher(broken, EQUAL, 2)


def test_rows_without_experts_that_get_anything_are_found():
    class GivesPaddingSomething(Broken):
        def combine(self, output, dispatched):
            return super().combine(output, dispatched) + 1e-9

    padded = next(case for case in CASES if case.routing == "padded")
    with pytest.raises(AssertionError, match="exactly 0"):
        check_dispatcher(GivesPaddingSomething, padded, 2)


def test_experts_that_do_not_divide_are_the_callers_mistake():
    with pytest.raises(ValueError, match="16 experts don't divide over ep=3"):
        check_dispatcher(right, DEFAULT, 3)
