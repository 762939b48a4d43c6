"""The grouped products of experts of plain weights, against float64, whatever their tiles.

In Triton's interpreter where there is no GPU. Shape legend: see
core.devices.cuda.experts.triton_moe_bf16.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.devices.cuda.experts.triton_expert_tiles import cut_into_tiles
from core.devices.cuda.experts.triton_moe_bf16 import PlainExperts, multiply
from core.devices.cuda.triton_ops import TritonOps
from core.interfaces.moe_a2a import Dispatched, Routes
from core.ops.expert_tiles import ExpertRows, ProductTile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
TILES = {
    "plain": ProductTile(32, 32, 4, 2),
    "swapped": ProductTile(64, 64, 4, 3, swap=True),
    "in-turns": ProductTile(64, 32, 4, 3, programs=1),
}
COUNTS = {"empty": [0, 5, 0, 40, 0], "one": [0, 0, 1, 0, 0], "even": [17, 17, 17, 17, 17]}


def normal(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(x: Tensor, weight: Tensor, gated: bool) -> Tensor:
    result = F.linear(x.double(), weight.double())
    if not gated:
        return result
    gate, up = result.chunk(2, dim=-1)
    return F.silu(gate) * up


def error_of(result: Tensor, right: Tensor) -> float:
    return float((result.cpu().double() - right).norm() / right.norm())


@pytest.mark.pairwise
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype"),
    [(40, 72, torch.bfloat16), (64, 64, torch.float32), (6, 10, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
def test_agrees_with_float64(
    tile: ProductTile,
    counts: list[int],
    gated: bool,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    gathered: bool,
) -> None:
    places = sum(counts)
    weight = normal(1, len(counts), outputs * (2 if gated else 1), inputs, dtype=dtype)
    source = torch.randperm(places, generator=torch.Generator().manual_seed(2))
    rows = normal(3, places, inputs, dtype=dtype)
    in_order = rows[source] if gathered else rows
    right = torch.cat(
        [product(x, weight[expert], gated) for expert, x in enumerate(in_order.split(counts))]
    )
    spare = 7  # places that the host counts and the device doesn't
    out = torch.full((places + spare, outputs), torch.nan, dtype=dtype, device=DEVICE)
    for block_M in (16, 64):
        multiply(
            ExpertRows(
                rows.to(DEVICE),
                None,
                source.to(DEVICE, torch.int32) if gathered else None,
                places + spare,
            ),
            weight.to(DEVICE),
            out,
            cut_into_tiles(torch.tensor(counts, device=DEVICE), places + spare, None, block_M),
            tile,
            gated=gated,
        )
        assert error_of(out[:places], right) <= TOLERANCE[dtype]
        assert out[places:].isnan().all()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="too large for the interpreter")
@pytest.mark.parametrize("num_rows", [1, 3, 8, 60, 200, 1000, 3000, 20000])
def test_chosen_tiles_agree_with_float64(num_rows: int) -> None:
    """Qwen3-30B-A3B's sizes."""
    num_experts, size_E, size_I, top_k = 128, 2048, 768, 8
    shapes = (num_experts, 2 * size_I, size_E), (num_experts, size_E, size_I)
    gate_up, down = (
        torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) * shape[2] ** -0.5
        for shape in shapes
    )
    experts = PlainExperts(gate_up, down, torch.bfloat16)
    ids = torch.rand((num_rows, num_experts), device=DEVICE).topk(top_k, dim=1).indices
    counts_L = torch.bincount(ids.flatten(), minlength=num_experts)
    places = num_rows * top_k
    x_PE = torch.randn((places, size_E), dtype=torch.bfloat16, device=DEVICE)
    tiles = cut_into_tiles(counts_L, places, None, experts.block_M(places, num_experts))
    middle = experts.gate_up(ExpertRows(x_PE, None, None, places), tiles)
    out_PE = torch.empty_like(x_PE)
    experts.down(middle, tiles, out_PE)
    for first, second, x, result in zip(
        gate_up, down, x_PE.split(counts_L.tolist()), out_PE.split(counts_L.tolist()), strict=True
    ):
        if x.shape[0]:
            right = F.linear(product(x, first, True), second.double())
            assert float((result.double() - right).norm() / right.norm()) <= 1e-2


@pytest.mark.skipif(DEVICE.type == "cpu", reason="too large for the interpreter")
@pytest.mark.parametrize("num_rows", [1, 3, 8, 16, 17])
def test_routed_rows_agree_with_float64(num_rows: int) -> None:
    """The same sizes, from routes to sums; padding has no experts."""
    num_experts, size_E, size_I, top_k = 128, 2048, 768, 8
    gate_up = torch.randn((num_experts, 2 * size_I, size_E), dtype=torch.bfloat16, device=DEVICE)
    down = torch.randn((num_experts, size_E, size_I), dtype=torch.bfloat16, device=DEVICE)
    gate_up, down = gate_up * size_E**-0.5, down * size_I**-0.5
    experts = TritonOps().experts(zip(gate_up, down, strict=True), num_experts, torch.bfloat16)
    drawn = torch.rand((num_rows + 2, num_experts), device=DEVICE).topk(top_k, dim=1)
    ids_TK, weights_TK = drawn.indices, drawn.values
    ids_TK[num_rows:] = -1
    x_TE = torch.randn((num_rows + 2, size_E), dtype=torch.bfloat16, device=DEVICE)
    no_counts = torch.empty(0, dtype=torch.int64, device=DEVICE)
    out = experts(Dispatched(x_TE, no_counts, None, routes=Routes(ids_TK, weights_TK)))
    right = torch.zeros((num_rows + 2, size_E), dtype=torch.float64, device=DEVICE)
    for row in range(num_rows):
        for expert, weight in zip(ids_TK[row].tolist(), weights_TK[row].tolist(), strict=True):
            middle = product(x_TE[row, None], gate_up[expert], True)
            right[row] += weight * F.linear(middle, down[expert].double())[0]
    assert float((out.double() - right).norm() / right.norm()) <= 1e-2
    assert not out[num_rows:].any()
