"""The Gluon kernel of fp8 experts with many rows against float64, on a Hopper GPU.

Gluon kernels run in no interpreter, so that there is nothing to test elsewhere. Shape legend: see
core.kernels.triton_moe_fp8.
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.interfaces.weights import BlockFp8
from core.kernels.block_fp8 import BLOCK, FP8, dequantize, dequantize_rows
from core.kernels.expert_tiles import ExpertRows
from core.kernels.triton_expert_tiles import cut_into_tiles
from core.kernels.triton_fp8 import quantize_rows

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
COUNTS = {
    "one": [1],
    "empty": [0, 5, 0, 300, 0],
    "whole": [128, 256],
    "many": [700, 1, 129, 127, 0, 2000],
}


def weight_of(num_experts: int, rows: int, columns: int) -> BlockFp8:
    values = torch.randn((num_experts, rows, columns), device="cuda").to(FP8)
    blocks = (num_experts, rows // BLOCK, columns // BLOCK)
    return BlockFp8(values, torch.rand(blocks, device="cuda") * columns**-0.5)


def exact(weight: BlockFp8, expert: int) -> Tensor:
    return dequantize(BlockFp8(weight.values_OI[expert], weight.scales[expert]), torch.float64)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("size_E", "size_I"), [(512, 256), (7168, 2048), (256, 128)], ids=str)
def test_both_products_equal_float64(counts: list[int], size_E: int, size_I: int) -> None:
    gluon = importlib.import_module("core.kernels.gluon_experts_fp8")
    torch.manual_seed(sum(counts))
    num_experts, places, spare = len(counts), sum(counts), 7
    gate_up = weight_of(num_experts, 2 * size_I, size_E)
    down = weight_of(num_experts, size_E, size_I)
    assert gluon.takes(gate_up, down)
    x_PE = torch.randn((places + spare, size_E), dtype=torch.bfloat16, device="cuda")
    x_PE[places:] = torch.nan
    rows = ExpertRows(*quantize_rows(x_PE), None, places + spare)
    counts_L = torch.tensor(counts, device="cuda")
    tiles = cut_into_tiles(counts_L, places + spare, None, gluon.ROWS)
    middle_PI = torch.zeros((places + spare, size_I), dtype=FP8, device="cuda")
    scales = torch.full((places + spare, size_I // BLOCK), torch.nan, device="cuda")
    gluon.multiply(rows, gate_up, tiles, middle_PI, scales)
    middle = ExpertRows(middle_PI, scales, None, places + spare)
    out_PE = torch.full_like(x_PE, torch.nan)
    gluon.multiply(middle, down, tiles, out_PE, None)
    assert out_PE[places:].isnan().all()
    assert scales[places:].isnan().all()
    start = 0
    for expert, count in enumerate(counts):
        own = slice(start, start + count)
        start += count
        if not count:
            continue
        x = dequantize_rows(rows.values[own], rows.scales[own], torch.float64)
        gate, up = F.linear(x, exact(gate_up, expert)).chunk(2, dim=1)
        right = F.silu(gate) * up
        result = dequantize_rows(middle_PI[own], scales[own], torch.float64)
        assert float((result - right).norm()) <= 4e-2 * float(right.norm())  # rounded to fp8
        right = F.linear(result, exact(down, expert))
        assert float((out_PE[own].double() - right).norm()) <= 1e-2 * float(right.norm())
