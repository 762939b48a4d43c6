"""Products over 4- and 8-bit groups against the dequantised matrix in float64."""

import dataclasses

import pytest
import torch

from core.devices.cpu.cpu_grouped_ints import FEW_ROWS, packed_linear
from core.devices.cpu.cpu_ops import CpuOps
from core.interfaces.weights import GroupedInts
from core.ops.grouped_ints import dequantize
from core.ops.torch_ops import TorchOps

HALF_STEP = 2.0**-8  # of bfloat16: what rounding to it changes at most, of a value


def made_up(bits: int, num_outputs: int, num_inputs: int, seed: int = 0) -> GroupedInts:
    """Random numbers, scales and minimums; ranges lie around 0 as those of weights do."""
    generator = torch.Generator().manual_seed(seed)
    groups = (num_outputs, num_inputs // 32)
    largest = 2**bits - 1
    scales = torch.rand(groups, generator=generator) / largest + 0.001
    minimums = -scales * largest * (0.4 + 0.2 * torch.rand(groups, generator=generator))
    values = torch.randint(
        0, largest + 1, (num_outputs, num_inputs), generator=generator, dtype=torch.uint8
    )
    return GroupedInts(values, scales, minimums, bits)


def reference(weight: GroupedInts) -> torch.Tensor:
    """The matrix in float64, value by value."""
    scales = weight.scales_OG.double().repeat_interleave(32, 1)
    minimums = weight.minimums_OG.double().repeat_interleave(32, 1)
    return weight.values_OI.double() * scales + minimums


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (208, 576), (576, 1536)])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 5, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_bfloat16(
    bits: int, shape: tuple[int, int], num_rows: int, dtype: torch.dtype
) -> None:
    weight = made_up(bits, *shape)
    x = torch.randn(num_rows, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2)).to(dtype)
    found = packed_linear(weight, bias)(x)
    assert found.dtype is dtype
    exact_weight = reference(weight)
    product = x.double() @ exact_weight.T
    # Rows are rounded, and so are scales and the middle of each group's range; sums of float32
    # are exact beside that. Then the result is rounded, and once more where a bias is added.
    scales = weight.scales_OG.double().repeat_interleave(32, 1)
    middles = weight.minimums_OG.double() + weight.scales_OG.double() * 2 ** (weight.bits - 1)
    half_range = 2 ** (weight.bits - 1) * scales
    of_weight = HALF_STEP * (half_range + middles.abs().repeat_interleave(32, 1))
    of_rows = HALF_STEP if dtype is torch.float32 else 0.0
    bound = x.double().abs() @ (of_weight + of_rows * (exact_weight.abs() + of_weight)).T
    bound += HALF_STEP * (product.abs() + bound) + HALF_STEP * (product + bias.double()).abs()
    error = (found.double() - product - bias.double()).abs()
    assert (error <= bound * 1.01 + 1e-6).all(), (error - bound).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_what_bfloat16_can_hold_is_exact(bits: int) -> None:
    weight = made_up(bits, 64, 128)
    scales = torch.full_like(weight.scales_OG, 0.25)
    weight = GroupedInts(weight.values_OI, scales, scales * -(2 ** (bits - 1)), bits)
    x = torch.randint(-4, 5, (7, 128), generator=torch.Generator().manual_seed(3)).float()
    expected = (x.double() @ reference(weight).T).to(torch.bfloat16)
    assert torch.equal(packed_linear(weight, None)(x), expected.float())


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantised_values(bits: int) -> None:
    weight = made_up(bits, 32, 64)
    torch.testing.assert_close(dequantize(weight, torch.float64), reference(weight))
    meta = GroupedInts(
        *(part.to("meta") for part in (weight.values_OI, weight.scales_OG)),
        weight.minimums_OG.to("meta"),
        bits,
    )
    assert dequantize(meta, torch.bfloat16).shape == (32, 64)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("wide", "dtype", "step"),
    [
        (torch.float16, torch.float32, 2.0**-11),
        (torch.bfloat16, torch.bfloat16, HALF_STEP),
    ],
)
def test_many_rows_are_multiplied_by_a_copy_in_16_bits(
    bits: int, wide: torch.dtype, dtype: torch.dtype, step: float
) -> None:
    weight = made_up(bits, 208, 576)
    both = packed_linear(dataclasses.replace(weight, wide=wide), None)
    kept = packed_linear(weight, None)
    few = FEW_ROWS[wide]
    x = torch.randn(few + 1, 576, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(both(x[:few]), kept(x[:few]))
    found, exact_weight = both(x), reference(weight)
    assert found.dtype is dtype
    assert found.shape == (few + 1, 208)
    expected = x.double() @ exact_weight.T
    # Weights are rounded, and results where they have 16 bits; sums of float32 are exact beside it.
    bound = step * (x.double().abs() @ exact_weight.abs().T)
    bound += HALF_STEP * expected.abs() if dtype is torch.bfloat16 else 1e-5
    error = (found.double() - expected).abs()
    assert (error <= bound * 1.01).all(), (error - bound).max()
    bias = torch.randn(208, generator=torch.Generator().manual_seed(2)).to(dtype)
    biased = packed_linear(dataclasses.replace(weight, wide=wide), bias)(x)
    torch.testing.assert_close(biased.double(), expected + bias.double(), atol=0.05, rtol=0.02)


def test_numbers_beyond_float16_have_no_copy() -> None:
    weight = made_up(8, 64, 96)
    large = dataclasses.replace(weight, scales_OG=weight.scales_OG * 1e7, wide=torch.float16)
    x = torch.randn(FEW_ROWS[torch.float16] + 1, 96, generator=torch.Generator().manual_seed(1))
    found = packed_linear(large, None)(x)
    assert torch.equal(found, packed_linear(dataclasses.replace(large, wide=None), None)(x))
    assert found.isfinite().all()


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_of_few_bits_has_the_best_logits_right(
    monkeypatch: pytest.MonkeyPatch, halves: bool, dtype: torch.dtype
) -> None:
    """With FBGEMM's float16, and as where torch has none."""
    if not halves:
        monkeypatch.setattr("core.devices.cpu.cpu_ops.holds_halves", lambda weight: False)
    matrix = dequantize(made_up(8, 4096, 64), dtype)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    expected = TorchOps().logits(matrix)(x)
    found = CpuOps().logits(matrix, quantized=True)(x)
    assert found.dtype is torch.float32
    best = expected.topk(8).indices
    torch.testing.assert_close(
        found.gather(1, best), expected.gather(1, best), atol=2e-3, rtol=1e-4
    )
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.02)
