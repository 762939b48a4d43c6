"""Block-scaled fp8 of every set of operations: experts and linear layers, against float64.

Triton's kernels run in its interpreter where there is no GPU; with one, `-k cuda` runs the sets
there, and what is of Triton alone runs there anyway. Shape legend: see core.ops.torch_moe.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core.interfaces.moe_a2a import Dispatched
from core.interfaces.ops import Ops
from core.interfaces.weights import BlockFp8
from core.ops.block_fp8 import dequantize, dequantize_rows, quantize, quantize_rows
from core.ops.moe_permute import sum_grouped
from tests.contracts.moe_cases import (
    TRITON,
    arranged,
    arrived,
    each_counts,
    each_layout,
    each_set,
    expected_of,
    normal,
    pairs_of,
    relative_error,
    results_of,
    routes_of,
    weights,
)

if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
    needs_fp8 = pytest.mark.skip("needs a GPU that multiplies fp8")
else:
    needs_fp8 = pytest.mark.filterwarnings("default")

# A GPU's sums of fp8 products keep some 14 bits, so that values between two fp8 numbers go the
# other way now and then; Triton's interpreter cuts to fp8 what a GPU rounds.
ROUGH = 3e-2 if torch.cuda.is_available() else 1.5e-1


def uneven(seed: int, matrix: Tensor, rows: int = 128) -> Tensor:
    """Blocks of very different sizes, so that a scale taken for another's shows."""
    shape = (-(-matrix.shape[0] // rows), -(-matrix.shape[1] // 128))
    powers = 2.0 ** torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed))
    spread = powers.repeat_interleave(rows, 0).repeat_interleave(128, 1)
    return (matrix.float() * spread[: matrix.shape[0], : matrix.shape[1]]).to(matrix.dtype)


def quantized(weight_LOI: Tensor) -> list[BlockFp8]:
    return [quantize(uneven(i, matrix)) for i, matrix in enumerate(weight_LOI)]


def rounded(x_ME: Tensor) -> Tensor:
    """What fp8 leaves of rows."""
    return dequantize_rows(*quantize_rows(x_ME), torch.float32)


@pytest.mark.pairwise
@needs_fp8
@pytest.mark.parametrize("given", ["rows", "fp8 rows"])
@each_counts
@each_layout
def test_triton_experts_of_fp8_blocks(counts: list[int], batched: bool, given: str) -> None:
    """The same as computing with what fp8 leaves of weights, rows, and rows in between."""
    _, make, device = TRITON
    hidden_size, size, dtype = 200, 256, torch.bfloat16
    gate_up_L, down_L = (
        quantized(w) for w in weights(len(counts), hidden_size, size, torch.float32)
    )
    parts = [
        uneven(7 + i, normal(3 + i, n, hidden_size, dtype=dtype), rows=1)
        for i, n in enumerate(counts)
    ]
    kernel = make().experts(pairs_of(gate_up_L, down_L, device), len(down_L), dtype)
    if given == "rows":
        dispatched = arranged(parts, batched, device)
    else:
        pairs = [quantize_rows(part) for part in parts]
        dispatched = arranged([p[0] for p in pairs], batched, device, [p[1] for p in pairs])
        if batched:  # DeepEP's scales lie by columns
            assert dispatched.scales is not None
            by_columns = dispatched.scales.transpose(1, 2).contiguous().transpose(1, 2)
            dispatched = Dispatched(dispatched.hidden, dispatched.counts_L, None, by_columns)
    out = kernel(dispatched)
    assert out.dtype == dtype
    assert out.shape == dispatched.hidden.shape
    for result, part, gate_up, down in zip(
        results_of(out, counts), parts, gate_up_L, down_L, strict=True
    ):
        gate, up = (
            (rounded(part).double() @ dequantize(gate_up, torch.float64).T).float().chunk(2, dim=-1)
        )
        middle = rounded(gate.sigmoid() * gate * up).double()
        # A value at the edge of two fp8 numbers may go either way.
        assert relative_error(result, middle @ dequantize(down, torch.float64).T) <= ROUGH


@needs_fp8
@pytest.mark.parametrize("num_rows", [1, 9, 16, 40])
@pytest.mark.parametrize("given", ["rows", "fp8 rows"])
def test_triton_experts_of_fp8_blocks_sum_rows_with_routes(num_rows: int, given: str) -> None:
    """The same as the same rows grouped beforehand."""
    _, make, device = TRITON
    hidden_size, size, dtype = 200, 256, torch.bfloat16
    pairs = (quantized(w) for w in weights(5, hidden_size, size, torch.float32))
    kernel = make().experts(pairs_of(*pairs, device), 5, dtype)
    x_TE, routes = normal(3, num_rows, hidden_size, dtype=dtype), routes_of(num_rows, 3, 5)
    on_device = arrived(x_TE, routes, device)
    assert on_device.routes is not None
    if given == "fp8 rows":  # quantised by who sent them
        values, scales = quantize_rows(on_device.hidden)
        on_device = replace(on_device, hidden=values, scales=scales)
    out = kernel(on_device)
    expected = sum_grouped(kernel, on_device, on_device.routes, 5, dtype)
    assert relative_error(out, expected.cpu().double()) <= 1e-2


@each_set
@each_layout
def test_every_set_takes_fp8_blocks_and_rows(ops: Ops, device: torch.device, batched: bool) -> None:
    counts, dtype = [3, 0, 5], torch.float32
    gate_up_L, down_L = (quantized(w) for w in weights(3, 128, 128, torch.float32))
    parts = [quantize_rows(normal(3 + i, n, 128)) for i, n in enumerate(counts)]
    dispatched = arranged([p[0] for p in parts], batched, device, [p[1] for p in parts])
    out = ops.experts(pairs_of(gate_up_L, down_L, device), len(down_L), dtype)(dispatched)
    for result, part, *matrices in zip(
        results_of(out, counts), parts, gate_up_L, down_L, strict=True
    ):
        x_ME = dequantize_rows(*part, torch.float32)
        expected = expected_of(x_ME, *(dequantize(m, torch.float32) for m in matrices))
        assert relative_error(result, expected) <= 5e-2 + ROUGH  # rows in between may be fp8


@pytest.mark.pairwise
@needs_fp8
@pytest.mark.parametrize("rows", [0, 1, 17, 130])
@pytest.mark.parametrize(("outputs", "inputs"), [(128, 128), (300, 200), (64, 384)])
@pytest.mark.parametrize("biased", [False, True])
def test_triton_linear_of_fp8_blocks(rows: int, outputs: int, inputs: int, biased: bool) -> None:
    _, make, device = TRITON
    weight = quantize(uneven(1, normal(1, outputs, inputs)))
    bias_O = normal(2, outputs).bfloat16() * 100 if biased else None
    # Values that fp8 holds, and one in each block that makes its scale a power of two.
    wide_TX = normal(3, rows, 2 * inputs).to(torch.float8_e4m3fn).float()
    wide_TX[:, inputs % 128 :: 128] = 448.0
    x_TI = uneven(4, wide_TX[:, inputs:], rows=1)
    wide_TX[:, inputs:] = x_TI
    x_TI = wide_TX.bfloat16()[:, inputs:]  # rows lie apart
    assert torch.equal(rounded(x_TI), x_TI.float())
    kernel = make().linear(
        BlockFp8(weight.values_OI.to(device), weight.scales.to(device)),
        None if bias_O is None else bias_O.to(device),
    )
    result = kernel(x_TI.to(device))
    assert result.dtype == torch.bfloat16
    assert result.shape == (rows, outputs)
    expected = x_TI.double() @ dequantize(weight, torch.float64).T
    expected += 0 if bias_O is None else bias_O.double()
    assert relative_error(result, expected) <= 5e-3


@each_set
def test_every_set_takes_linear_layers_of_fp8_blocks(ops: Ops, device: torch.device) -> None:
    weight, x_TI = quantize(normal(1, 160, 256)), normal(3, 5, 256)
    moved = BlockFp8(weight.values_OI.to(device), weight.scales.to(device))
    expected = x_TI.double() @ dequantize(weight, torch.float64).T
    assert relative_error(ops.linear(moved, None)(x_TI.to(device)), expected) <= 5e-2
