"""The shipped contract of attention finds what is wrong with a backend."""

from dataclasses import replace

import pytest
import torch

from core.interfaces.attention import LayerKV
from core.plugin.hookspecs import NoOptions
from core.testing.attention import CAPTURED, CASES, DECODE, PREFILL, check_backend, check_captured
from plugins.attention._torch_ref.heads import build


def right(spec):
    return build(NoOptions(), spec)


class Broken:
    """A right backend behind a mistake."""

    def __init__(self, spec):
        self._inner = right(spec)

    def plan(self, batch):
        return self._inner.plan(batch)

    def forward(self, plan, kv, q_THD, out_THD, new):
        self._inner.forward(plan, kv, q_THD, out_THD, new)


class OtherScale(Broken):
    def __init__(self, spec):
        self._inner = right(replace(spec, scale=spec.scale * 1.01))


class LeavesTheLastRow(Broken):
    def forward(self, plan, kv, q_THD, out_THD, new):
        super().forward(plan, kv, q_THD, out_THD, new)
        out_THD[-1] = torch.nan


class SwapsHeads(Broken):
    def forward(self, plan, kv, q_THD, out_THD, new):
        super().forward(plan, kv, q_THD.flip(1), out_THD, new)


class ShortContext(Broken):
    """Does not see a sequence's first page."""

    def plan(self, batch):
        pages = batch.page_table_SM.clone()
        pages[:, 0] = pages[:, 1]
        return super().plan(replace(batch, page_table_SM=pages))


class ReadsTheScratchPage(Broken):
    def plan(self, batch):
        return super().plan(replace(batch, page_table_SM=torch.zeros_like(batch.page_table_SM)))


class KeepsTheFirstLayersRows(Broken):
    """A copy of the cache, made once: stale in every other layer."""

    _copy = None

    def forward(self, plan, kv, q_THD, out_THD, new):
        self._copy = self._copy or LayerKV(kv.k_NPGD.clone(), kv.v_NPGD.clone())
        super().forward(plan, self._copy, q_THD, out_THD, new)


class KeepsTheStepsRows(Broken):
    """A copy of each layer's cache, though pages hold other rows in the next step."""

    def __init__(self, spec):
        super().__init__(spec)
        self._kept = []

    def forward(self, plan, kv, q_THD, out_THD, new):
        if len(self._kept) < 2:
            self._kept.append(LayerKV(kv.k_NPGD.clone(), kv.v_NPGD.clone()))
        else:  # the third is the first layer of the second step
            kv = self._kept[0]
        super().forward(plan, kv, q_THD, out_THD, new)


class KeepsTheFirstPlan(Broken):
    _plan = None

    def plan(self, batch):
        self._plan = self._plan or super().plan(batch)
        return self._plan


class WritesIntoTheCache(Broken):
    def forward(self, plan, kv, q_THD, out_THD, new):
        super().forward(plan, kv, q_THD, out_THD, new)
        kv.v_NPGD.mul_(2)


def test_a_right_one_passes():
    check_backend(right, PREFILL[3])
    check_backend(right, DECODE[3], torch.bfloat16)


@pytest.mark.parametrize("broken", Broken.__subclasses__())
def test_a_broken_one_is_found(broken):
    with pytest.raises(AssertionError):
        check_backend(broken, DECODE[3])  # pages of one token


@pytest.mark.parametrize(("case", "bounds"), CAPTURED, ids=str)
def test_who_says_it_is_capturable_and_reads_lengths_on_the_host_is_found(case, bounds):
    class SaysSo(Broken):
        capturable = True

    with pytest.raises((AssertionError, RuntimeError)):  # rows that are not there can't be read
        check_captured(SaysSo, case, bounds)


def test_cases_differ():
    assert len({str(case) for case in CASES}) == len(CASES)
