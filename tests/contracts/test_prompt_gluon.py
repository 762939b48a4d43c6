"""The Gluon kernel of prompts against float64, and the blocks that it is given.

The kernel runs on a Hopper GPU alone; the blocks are made in Triton's interpreter where there is
no GPU.
"""

import importlib
import itertools

import pytest
import torch

from core.testing.attention import Case, as_captured, make_step
from plugins.attention._triton_heads.prompt_kernels import blocks_kernel

CUDA = torch.cuda.is_available()
HOPPER = CUDA and torch.cuda.get_device_capability()[0] == 9
DEVICE = torch.device("cuda" if CUDA else "cpu")
CASES = [
    Case(rows=(300, 1, 2048, 129, 500), cached=(0,) * 5, num_heads=8, num_kv_heads=2, head_dim=128),
    Case(rows=(1024,), cached=(0,), num_heads=32, num_kv_heads=32, head_dim=128),
    Case(rows=(64, 127, 128, 4000), cached=(0,) * 4, num_heads=5, num_kv_heads=1, head_dim=128),
    Case(rows=(1, 2, 63), cached=(0,) * 3, num_heads=2, num_kv_heads=1, head_dim=128),
    Case(rows=(300, 1, 700), cached=(5, 999, 128), num_heads=8, num_kv_heads=2, head_dim=128),
    Case(
        rows=(1024, 127, 3),
        cached=(4000, 0, 127),
        page_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
    ),
    Case(rows=(129, 64), cached=(1, 64), page_size=128, num_heads=2, head_dim=128),
    Case(rows=(2048,), cached=(64,), page_size=8, num_heads=4, num_kv_heads=4, head_dim=128),
]


@pytest.mark.parametrize("surplus", [0, 1, 200])
@pytest.mark.parametrize("lengths", [[1], [16, 1, 15, 33], [0, 5, 0, 32, 0], [160]], ids=str)
@pytest.mark.parametrize("cached", [None, 0, 1, 15, 16, 40], ids=str)
def test_blocks_cover_every_row_once(lengths: list[int], surplus: int, cached: int | None) -> None:
    """Tokens of each sequence are `cached` before its new rows; None: of a step without any."""
    block_M, used = 16, sum(lengths)
    before = [cached or 0 if length else 0 for length in lengths]
    starts = list(itertools.accumulate(lengths, initial=0))
    most = 1 if cached is None else 2  # of a sequence, beside its rows over those of a block
    num_blocks = (used + surplus) // block_M + most * len(lengths) + 1
    blocks_BX = torch.full((num_blocks, 5), -9, dtype=torch.int32, device=DEVICE)
    contexts = [length + tokens for length, tokens in zip(lengths, before, strict=True)]
    blocks_kernel[(num_blocks,)](
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        blocks_BX,
        len(lengths),
        num_blocks,
        used + surplus,
        PREFIX=cached is not None,
        BLOCK_M=block_M,
    )
    attended, zeroed = [], []
    for start, first_row, num_rows, position, sequence in blocks_BX.tolist():
        if position >= 0:
            assert (start, num_rows) == (starts[sequence], lengths[sequence])
            assert position == before[sequence] + first_row
            assert position % block_M == 0
            last = min(first_row + block_M, num_rows)
            attended += range(start + max(first_row, 0), start + last)
        else:
            assert (first_row, position) == (0, -1)
            zeroed += range(start, start + num_rows)
    assert sorted(attended) == list(range(used))
    assert sorted(zeroed) == list(range(used, used + surplus))


@pytest.mark.skipif(not HOPPER, reason="Gluon kernels run in no interpreter")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case: Case) -> None:
    gluon = importlib.import_module("plugins.attention._triton_heads.prompt_gluon")
    step = make_step(case, torch.bfloat16, DEVICE)
    assert gluon.fits(step.spec)
    prompts = gluon.GluonPrompts(step.spec, step.spec.scale * 1.4426950408889634, 132)
    plan = prompts.plan(step.batch)
    outs = [torch.full_like(step.q_THD, torch.nan) for _ in range(2)]
    for out_THD in outs:
        prompts.attend(plan, step.kv, step.q_THD.clone(), step.new, out_THD)
    error_T = (outs[0].cpu().double() - step.expected_THD).flatten(1).norm(dim=1)
    assert torch.all(error_T <= 1e-2 * step.expected_THD.flatten(1).norm(dim=1))
    assert torch.equal(*outs)


@pytest.mark.skipif(not HOPPER, reason="Gluon kernels run in no interpreter")
@pytest.mark.parametrize(
    ("case", "bounds"), [(CASES[0], (6, 3000, 2100)), (CASES[4], (4, 1001, 1500))], ids=str
)
def test_lengths_on_the_device_rule(case: Case, bounds: tuple[int, int, int]) -> None:
    gluon = importlib.import_module("plugins.attention._triton_heads.prompt_gluon")
    step = as_captured(make_step(case, torch.bfloat16, DEVICE), *bounds)
    prompts = gluon.GluonPrompts(step.spec, step.spec.scale * 1.4426950408889634, 132)
    out_THD = torch.full_like(step.q_THD, torch.nan)
    prompts.attend(prompts.plan(step.batch), step.kv, step.q_THD, step.new, out_THD)
    error_T = (out_THD.cpu().double() - step.expected_THD).flatten(1).norm(dim=1)
    assert torch.all(error_T <= 1e-2 * step.expected_THD.flatten(1).norm(dim=1))


@pytest.mark.skipif(not HOPPER, reason="Gluon kernels run in no interpreter")
@pytest.mark.parametrize("rows", [(200, 300), (128, 1, 127)], ids=str)
def test_another_sequence_s_nan_stays_there(rows: tuple[int, ...]) -> None:
    gluon = importlib.import_module("plugins.attention._triton_heads.prompt_gluon")
    case = Case(rows=rows, cached=(0,) * len(rows), num_heads=4, num_kv_heads=2, head_dim=128)
    step = make_step(case, torch.bfloat16, DEVICE)
    prompts = gluon.GluonPrompts(step.spec, step.spec.scale * 1.4426950408889634, 132)
    plan = prompts.plan(step.batch)
    first = rows[0]
    step.new.k_TGD[first:] = torch.nan
    step.new.v_TGD[first:] = torch.nan
    out_THD = torch.empty_like(step.q_THD)
    prompts.attend(plan, step.kv, step.q_THD, step.new, out_THD)
    error = (out_THD[:first].cpu().double() - step.expected_THD[:first]).norm()
    assert error <= 1e-2 * step.expected_THD[:first].norm()
