"""The grouped products of experts of plain weights, against float64, whatever their tiles.

In Triton's interpreter where there is no GPU. Shape legend: see core.kernels.triton_moe_bf16.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.kernels.expert_tiles import ExpertRows, ProductTile
from core.kernels.triton_expert_tiles import cut_into_tiles
from core.kernels.triton_moe_bf16 import PlainExperts, multiply

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
            rows.to(DEVICE),
            source.to(DEVICE, torch.int32) if gathered else None,
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
