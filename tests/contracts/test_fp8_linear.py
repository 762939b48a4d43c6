"""Linear layers of fp8 blocks, against float64 products of what is stored, whatever their tiles.

In Triton's interpreter where there is no GPU. Shape legend: see
core.devices.cuda.linear.triton_fp8_tiles.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from core.devices.cuda.linear.triton_fp8 import ANY_ROWS, gated_linear, linear, measured, prepare
from core.interfaces.weights import BlockFp8
from core.ops.block_fp8 import dequantize, num_blocks, quantize_rows
from core.ops.torch_ops import TorchOps
from tests.contracts import plain_ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
    pytestmark = pytest.mark.skip("needs a GPU that multiplies fp8")
BASE: dict[str, Any] = {"path": "tiles", "PREFETCH_I": 0, "num_warps": 4, "num_stages": 3}
TILES: list[dict[str, Any]] = [
    {"BLOCK_T": 16, "BLOCK_O": 32, "SPLIT": 1, "QUANTIZED": 0, "TURNED": 0},
    {"BLOCK_T": 16, "BLOCK_O": 64, "SPLIT": 3, "QUANTIZED": 0, "TURNED": 1, "PREFETCH_I": 512},
    {"BLOCK_T": 32, "BLOCK_O": 128, "SPLIT": 2, "QUANTIZED": 1, "TURNED": 1, "PREFETCH_I": 256},
    {"BLOCK_T": 64, "BLOCK_O": 64, "SPLIT": 1, "QUANTIZED": 1, "TURNED": 0, "APART": True},
]
each_tile = pytest.mark.parametrize(
    "tile", TILES, ids=lambda tile: "-".join(map(str, tile.values()))
)
each_form = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(seed: int, outputs: int, inputs: int) -> BlockFp8:
    scales = normal(seed, num_blocks(outputs), num_blocks(inputs)).exp() / 448.0
    return BlockFp8(normal(seed + 1, outputs, inputs).to(torch.float8_e4m3fn), scales)


def on_device(weight: BlockFp8) -> BlockFp8:
    return BlockFp8(weight.values_OI.to(DEVICE), weight.scales.to(DEVICE))


def exact_rows(seed: int, rows: int, inputs: int) -> Tensor:
    """bfloat16 rows that fp8 blocks hold: values of fp8, and the largest in each block."""
    values = normal(seed, rows, inputs).to(torch.float8_e4m3fn).float()
    values[:, ::128] = 448.0
    x = (values * 2.0 ** (torch.arange(rows) % 5 - 2)[:, None]).bfloat16()
    stored, scales = quantize_rows(x)
    restored = stored.float() * scales.repeat_interleave(128, -1)[:, :inputs]
    assert torch.equal(restored, x.float())
    return x


def expected(weight: BlockFp8, bias: Tensor | None, x: Tensor, gated: bool) -> Tensor:
    out = x.double() @ dequantize(weight, torch.float64).T
    out += 0 if bias is None else bias.double()
    return plain_ops.silu_and_mul(out) if gated else out


def error(result: Tensor, right: Tensor) -> float:
    return ((result.cpu().double() - right).norm() / right.norm().clamp_min(1e-30)).item()


@pytest.mark.pairwise
@each_tile
@each_form
@pytest.mark.parametrize(("outputs", "inputs"), [(34, 136), (64, 64), (288, 256)])
def test_agrees_with_float64(tile: dict[str, Any], gated: bool, outputs: int, inputs: int) -> None:
    weight, bias = blocks(1, outputs, inputs), normal(2, outputs).bfloat16() * 9
    silu_and_mul = TorchOps().silu_and_mul if gated else None
    for each_bias in (None, bias):
        kernel = prepare(
            on_device(weight),
            None if each_bias is None else each_bias.to(DEVICE),
            silu_and_mul,
            {**BASE, "max_rows": 70, **tile},
        )
        for rows in (1, 17, 70):
            x = exact_rows(3, rows, inputs)
            apart = torch.cat([x, x], 1).to(DEVICE)[:, inputs:]  # rows lie apart
            result = kernel(apart)
            assert result.dtype == torch.bfloat16
            assert error(result, expected(weight, each_bias, x, gated)) <= 1e-2
            assert torch.equal(kernel(apart), result)  # whoever adds the parts of a sum


@each_form
def test_chosen_kernels_take_any_number_of_rows(gated: bool) -> None:
    weight = blocks(1, 320, 512)
    moved, make = on_device(weight), TorchOps().silu_and_mul
    kernel = gated_linear(moved, None, make) if gated else linear(moved, None)
    for rows in (0, 1, 33, 140):
        x = exact_rows(3, rows, 512)
        result = kernel(x.to(DEVICE))
        assert result.shape == (rows, 160 if gated else 320)
        assert error(result, expected(weight, None, x, gated)) <= 1e-2
        transposed = x.t().contiguous().t().to(DEVICE)  # columns lie apart
        assert torch.equal(kernel(transposed), result)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="too large for the interpreter")
@each_form
@pytest.mark.parametrize("shape", [(2112, 7168), (4096, 7168), (7168, 2048), (3072, 1536)], ids=str)
def test_chosen_kernels_agree_with_float64(gated: bool, shape: tuple[int, int]) -> None:
    weight = blocks(1, *shape)
    moved, make = on_device(weight), TorchOps().silu_and_mul
    kernel = gated_linear(moved, None, make) if gated else linear(moved, None)
    for rows in (1, 5, 16, 30, 64, 100, 129, 513, 1027):
        x = exact_rows(3, rows, shape[1])
        graph, static = torch.cuda.CUDAGraph(), x.to(DEVICE)
        eager = kernel(static)
        assert error(eager, expected(weight, None, x, gated)) <= 1e-2
        with torch.cuda.graph(graph):
            captured = kernel(static)
        for _ in range(2):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, eager)


def test_every_number_of_rows_has_a_kernel_of_ours() -> None:
    for shape in [(2112, 7168), (100, 100)]:
        for gated in (False, True):
            found = measured(torch.device("cpu"), *shape, gated)
            assert found[-1]["max_rows"] == ANY_ROWS
            assert [tile["max_rows"] for tile in found] == sorted(
                tile["max_rows"] for tile in found
            )
