"""The shipped contract of latent attention finds what is wrong with a backend."""

from dataclasses import replace

import pytest
import torch

from core.plugin.hookspecs import NoOptions
from core.testing.latent_attention import (
    CASES,
    SMALL,
    TOLERANCE,
    Case,
    check_backend,
    check_captured,
    check_parts,
    make_step,
)
from plugins.attention._torch_ref.latent import build

CPU = torch.device("cpu")
DECODES = Case(rows=(1, 1, 1), cached=(40, 16, 3), page_size=4)
PROMPTS = Case(rows=(5, 2, 9), cached=(0, 16, 3), page_size=4)


def right(spec):
    return build(NoOptions(), spec)


class Broken:
    """A right backend behind a mistake."""

    capturable = True

    def __init__(self, spec):
        self.spec = spec
        self._inner = right(spec)

    def plan(self, batch):
        return self._inner.plan(batch)

    def absorbed(self, plan, cache_BPZ, q_THC, q_THR, out_THC):
        self._inner.absorbed(plan, cache_BPZ, q_THC, q_THR, out_THC)

    def expanded(self, plan, cache_BPZ, q_THD, expand, out_THV):
        self._inner.expanded(plan, cache_BPZ, q_THD, expand, out_THV)


class ScalesByTheLatents(Broken):
    """The mistake that is easily made: the scale is that of whole heads in both forms."""

    def absorbed(self, plan, cache_BPZ, q_THC, q_THR, out_THC):
        wrong = (self.spec.latent_dim + self.spec.rope_dim) ** -0.5
        right(replace(self.spec, scale=wrong)).absorbed(plan, cache_BPZ, q_THC, q_THR, out_THC)


class ForgetsTheScale(Broken):
    def __init__(self, spec):
        self._inner = right(replace(spec, scale=1.0))


class ForgetsTheRotaryPart(Broken):
    def absorbed(self, plan, cache_BPZ, q_THC, q_THR, out_THC):
        super().absorbed(plan, cache_BPZ, q_THC, torch.zeros_like(q_THR), out_THC)


class ForgetsTheRotaryPartOfHeads(Broken):
    def expanded(self, plan, cache_BPZ, q_THD, expand, out_THV):
        q_THD[..., -1] = 0
        super().expanded(plan, cache_BPZ, q_THD, expand, out_THV)


class SwapsHeads(Broken):
    def absorbed(self, plan, cache_BPZ, q_THC, q_THR, out_THC):
        super().absorbed(plan, cache_BPZ, q_THC.flip(1), q_THR, out_THC)


class LeavesTheLastRow(Broken):
    def expanded(self, plan, cache_BPZ, q_THD, expand, out_THV):
        super().expanded(plan, cache_BPZ, q_THD, expand, out_THV)
        out_THV[-1] = torch.nan


class MissesTheFirstPage(Broken):
    def plan(self, batch):
        pages = batch.page_table_SM.clone()
        pages[:, 0] = pages[:, 1]
        return super().plan(replace(batch, page_table_SM=pages))


class SeesOneTokenLess(Broken):
    """Of rows that have more than one."""

    def plan(self, batch):
        shorter = [max(length - 1, 1) for length in batch.context_lens]
        return super().plan(replace(batch, context_lens=shorter))


class KeepsTheFirstLayersRows(Broken):
    """A copy of the cache, made once: stale in every other layer."""

    _copy = None

    def absorbed(self, plan, cache_BPZ, q_THC, q_THR, out_THC):
        if self._copy is None:
            self._copy = cache_BPZ.clone()
        super().absorbed(plan, self._copy, q_THC, q_THR, out_THC)


class KeepsTheStepsRows(Broken):
    """Keys and values of a layer that the next step finds again, though pages hold others then."""

    def __init__(self, spec):
        super().__init__(spec)
        self._kept = []

    def expanded(self, plan, cache_BPZ, q_THD, expand, out_THV):
        if len(self._kept) < 2:
            self._kept.append(cache_BPZ.clone())
            super().expanded(plan, cache_BPZ, q_THD, expand, out_THV)
        else:  # the third is the first layer of the second step
            super().expanded(plan, self._kept[0], q_THD, expand, out_THV)


class KeepsTheFirstPlan(Broken):
    _plan = None

    def plan(self, batch):
        self._plan = self._plan or super().plan(batch)
        return self._plan


class WritesIntoTheCache(Broken):
    def absorbed(self, plan, cache_BPZ, q_THC, q_THR, out_THC):
        super().absorbed(plan, cache_BPZ, q_THC, q_THR, out_THC)
        cache_BPZ *= 2


def test_a_right_one_passes():
    check_backend(right, DECODES)
    check_backend(right, PROMPTS, torch.bfloat16)


@pytest.mark.parametrize("broken", Broken.__subclasses__())
def test_a_broken_one_is_found(broken):
    for case in (DECODES, PROMPTS):
        with pytest.raises(AssertionError):
            check_backend(broken, case)


def test_expanding_too_much_or_twice_is_found():
    class Twice(Broken):
        def expanded(self, plan, cache_BPZ, q_THD, expand, out_THV):
            super().expanded(plan, cache_BPZ, q_THD, expand, out_THV)
            super().expanded(plan, cache_BPZ, q_THD, expand, out_THV)

    step, tolerance = make_step(PROMPTS, torch.float32, CPU), TOLERANCE[torch.float32]
    check_parts(right, step, tolerance, 18)  # one sequence at a time
    with pytest.raises(AssertionError, match="at once"):
        check_parts(right, step, tolerance, 17)
    with pytest.raises(AssertionError, match="again"):
        check_parts(Twice, step, tolerance, 18)


def test_a_step_whose_lengths_only_the_device_knows_finds_who_asks_the_host():
    step = make_step(DECODES, torch.float32, CPU)
    with pytest.raises(AssertionError):  # says it is capturable, and reads the host's bounds
        check_captured(Broken, step, TOLERANCE[torch.float32], padding=2)
    with pytest.raises(AssertionError):
        check_captured(right, step, TOLERANCE[torch.float32], padding=2)


def test_cases_differ():
    assert len({str(case) for case in CASES}) == len(CASES)
    assert set(SMALL) < set(CASES)
