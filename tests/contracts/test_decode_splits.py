"""Paged decode whose programs take further splits as they end: right, and the same every time.

The device is taken to have four multiprocessors, so that small batches are cut into all levels. In
Triton's interpreter, where one program takes all that is left, if there is no GPU.
"""

from dataclasses import replace

import pytest
import torch

from core.testing.attention import Case, Step, make_step
from plugins.attention._triton_heads.decode import DecodeChoice, PagedDecode
from plugins.attention._triton_heads.device import describe

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]
CASES = [
    Case(rows=(1,) * 7, cached=(900, 0, 15, 640, 16, 300, 77), num_heads=4, num_kv_heads=2),
    Case(rows=(1,) * 12, cached=(127,) * 11 + (140,), page_size=5, num_heads=9, num_kv_heads=3),
    Case(rows=(1, 1), cached=(1500, 700), page_size=64, num_heads=8, num_kv_heads=1, head_dim=64),
]


def decode_of(step: Step, programs: int, levels: int) -> PagedDecode:
    """With small tiles, on four multiprocessors."""
    choice = DecodeChoice(
        max_rows=len(step.batch.query_lens),
        tokens=16,
        num_warps=4,
        num_stages=3,
        max_registers=None,
        programs=programs,
        levels=levels,
    )
    return PagedDecode(step.spec, replace(describe(DEVICE), num_multiprocessors=4), choice)


@pytest.mark.pairwise
@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("levels", [2, 4, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_splits_of_all_levels(case: Case, dtype: torch.dtype, levels: int, programs: int) -> None:
    step = make_step(case, dtype, DEVICE)
    decode = decode_of(step, programs, levels)
    plan = decode.plan(step.batch)
    second_level = plan.schedule_RX[4 * programs : 8 * programs, 3]
    assert (second_level > 0).any()
    outs = [torch.full_like(step.q_THD, float("nan")).contiguous() for _ in range(3)]
    for out in outs:
        decode.attend(plan, step.kv, step.q_THD, out)
    error = (outs[0].double().cpu() - step.expected_THD).norm() / step.expected_THD.norm()
    assert error < (1e-5 if dtype is torch.float32 else 1e-2)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_steps_of_other_lengths_follow() -> None:
    """Nothing of a step is left for the next."""
    step = make_step(CASES[0], torch.float32, DEVICE)
    used = decode_of(step, programs=1, levels=4)
    for length in (900, 1, 500):
        context_lens_S = torch.ones_like(step.batch.context_lens_S)
        context_lens_S[0] = length
        batch = replace(step.batch, context_lens_S=context_lens_S)
        out, expected = (torch.full_like(step.q_THD, float("nan")).contiguous() for _ in range(2))
        used.attend(used.plan(batch), step.kv, step.q_THD, out)
        fresh = decode_of(step, programs=1, levels=4)
        fresh.attend(fresh.plan(batch), step.kv, step.q_THD, expected)
        assert torch.equal(out, expected)
