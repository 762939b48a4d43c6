"""The contract of what takes rows to experts and back: torch and Triton, against loops."""

import pytest
import torch
from torch import Tensor

from core.devices.cuda.experts import triton_moe_groups, triton_moe_permute
from core.ops.moe_permute import group_rows, sum_results
from tests.support.routing import SHAPES, routing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def expected_sum(results: Tensor, positions_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    out = torch.zeros(len(positions_TK), results.shape[1], dtype=torch.float64)
    for row, of_row in enumerate(positions_TK.tolist()):
        for k, place in enumerate(of_row):
            weight = 1.0 if weights_TK is None else float(weights_TK[row, k])
            if place >= 0:
                out[row] += weight * results[place].double()
    return out


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "top_k", "num_experts"), SHAPES)
@pytest.mark.parametrize("kernel", ["torch", pytest.param("triton", marks=pytest.mark.pairwise)])
def test_sums_are_of_each_row_s_own_results(
    kernel: str,
    num_rows: int,
    top_k: int,
    num_experts: int,
    dtype: torch.dtype,
    weighted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("core.ops.moe_permute._COPY_BYTES", 4 * 66 * 70)  # several blocks
    monkeypatch.setattr("core.devices.cuda.experts.triton_moe_permute._MOST_COLUMNS", 64)
    experts_TK = routing(num_rows, top_k, num_experts)
    positions_TK = group_rows(experts_TK, num_experts).positions_TK
    num_pairs = int((experts_TK >= 0).sum())
    generator = torch.Generator().manual_seed(1)
    results = torch.randn(num_pairs + 3, 150, generator=generator).to(dtype)
    results[num_pairs:] = float("nan")  # what no position names
    weights_TK = torch.rand(num_rows, top_k, generator=generator) if weighted else None
    expected = expected_sum(results, positions_TK, weights_TK)
    for out_dtype in (torch.float32, dtype):
        if kernel == "torch":
            got = sum_results(results, positions_TK, weights_TK, out_dtype)
        else:
            got = triton_moe_permute.sum_results(
                results.to(DEVICE),
                positions_TK.to(DEVICE),
                None if weights_TK is None else weights_TK.to(DEVICE),
                torch.empty(num_rows, 150, dtype=out_dtype, device=DEVICE),
            ).cpu()
        assert got.dtype == out_dtype
        step = torch.finfo(out_dtype).eps
        torch.testing.assert_close(got.double(), expected, atol=8 * 2.0**-23, rtol=step)


@pytest.mark.parametrize(("num_rows", "top_k", "num_experts"), SHAPES[1:])
def test_triton_groups_rows_as_torch_does(num_rows: int, top_k: int, num_experts: int) -> None:
    experts_TK = routing(num_rows, top_k, num_experts)
    expected = group_rows(experts_TK, num_experts, num_pairs=experts_TK.numel())
    source, counts_L, positions_TK = triton_moe_groups.group_pairs(
        experts_TK.to(DEVICE), num_experts
    )
    assert torch.equal(source.cpu(), expected.source)
    assert torch.equal(counts_L.cpu(), expected.counts_L)
    assert torch.equal(positions_TK.cpu(), expected.positions_TK)


@pytest.mark.each_choice
@pytest.mark.parametrize(
    ("num_rows", "top_k"), [(1, 1), (3, 8), (16, 8), (17, 8), (128, 8), (129, 8), (2500, 8)]
)
@pytest.mark.parametrize("case", ["one expert", "none", "few experts", "any"])
def test_extreme_routings_are_grouped(num_rows: int, top_k: int, case: str) -> None:
    num_experts = 130
    lowest, beyond = {
        "one expert": (77, 78),
        "none": (-1, 0),
        "few experts": (40, 43),
        "any": (-1, num_experts),
    }[case]
    generator = torch.Generator().manual_seed(num_rows)
    experts_TK = torch.randint(lowest, beyond, (num_rows, top_k), generator=generator)
    expected = group_rows(experts_TK, num_experts, num_pairs=experts_TK.numel())
    source, counts_L, positions_TK = triton_moe_groups.group_pairs(
        experts_TK.to(DEVICE), num_experts
    )
    assert torch.equal(source.cpu(), expected.source)
    assert torch.equal(counts_L.cpu(), expected.counts_L)
    assert torch.equal(positions_TK.cpu(), expected.positions_TK)


@pytest.mark.parametrize("block_M", [16, 64])
@pytest.mark.parametrize(
    ("num_rows", "top_k", "num_experts"), [*SHAPES[1:], (100, 8, 127), (200, 8, 127), (600, 8, 127)]
)
def test_groups_are_cut_into_tiles(
    num_rows: int, top_k: int, num_experts: int, block_M: int
) -> None:
    experts_TK = routing(num_rows, top_k, num_experts)
    check_tiles(experts_TK, num_experts, block_M)


@pytest.mark.parametrize("most_pairs", [64, 40])
@pytest.mark.parametrize("experts", [[77], [-1], [3, 4]], ids=str)
def test_extreme_routings_are_cut_into_tiles(
    experts: list[int], most_pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One group of many tiles, none, and two; by every way to group."""
    monkeypatch.setattr("core.devices.cuda.experts.triton_moe_groups.MOST_PAIRS", most_pairs)
    for num_rows in (3, 50, 130):
        experts_TK = torch.tensor(experts).repeat(num_rows)[:num_rows].view(-1, 1)
        check_tiles(experts_TK, 130, 16)


def check_tiles(experts_TK: Tensor, num_experts: int, block_M: int) -> None:
    """Against a loop over experts."""
    groups = triton_moe_groups.group_into_tiles(experts_TK.to(DEVICE), num_experts, block_M)
    expected = group_rows(experts_TK, num_experts, num_pairs=experts_TK.numel())
    num_real = int((experts_TK >= 0).sum())
    assert torch.equal(groups.source_P.cpu()[:num_real], expected.source[:num_real])
    assert torch.equal(groups.positions_TK.cpu(), expected.positions_TK)
    tiles, start = [], 0
    for expert, count in enumerate(expected.counts_L.tolist()):
        firsts = range(start, start + count, block_M)
        tiles += [(expert, first, start + count) for first in firsts]
        start += count
    num_tiles, *got = groups.tiles.tiles.tolist()
    most = groups.tiles.max_tiles
    columns = (got[part * most : part * most + num_tiles] for part in range(3))
    assert num_tiles <= most
    assert list(zip(*columns, strict=True)) == tiles
