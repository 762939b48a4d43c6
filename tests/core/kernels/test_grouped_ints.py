"""Products over 4- and 8-bit groups against the dequantised matrix in float64."""

import pytest
import torch

from core.interfaces.weights import GroupedInts
from core.kernels.cpu_ops import CpuOps
from core.kernels.grouped_ints import dequantize, packed_linear
from core.kernels.torch_ops import TorchOps

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


def test_a_head_computes_its_best_logits_from_the_matrix() -> None:
    groups = made_up(8, 4096, 64)
    matrix = dequantize(groups, torch.float32)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    expected = TorchOps().logits(matrix)(x)
    found = CpuOps().logits(matrix, groups)(x)
    best = expected.topk(8).indices
    torch.testing.assert_close(found.gather(1, best), expected.gather(1, best))
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.02)
    assert not torch.equal(found, expected)
