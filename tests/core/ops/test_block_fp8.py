"""fp8 blocks: what they hold, against arithmetic written out here, and which device keeps them."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from core.devices.weight_formats import BlockFp8Format, select_format
from core.interfaces.model import BlockQuantization
from core.interfaces.weights import BlockFp8, PlainFormat, Shard
from core.ops.block_fp8 import (
    dequantize,
    dequantize_rows,
    linear,
    num_blocks,
    quantize,
    quantize_rows,
)
from core.ops.torch_moe import stack_experts

FP8 = torch.float8_e4m3fn
SHAPES = [(1, 1), (128, 128), (129, 127), (300, 576), (256, 1)]
BLOCKS = BlockQuantization(128, 128)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_blocks(seed: int, outputs: int, inputs: int) -> BlockFp8:
    scales = normal(seed, num_blocks(outputs), num_blocks(inputs)).exp()
    return BlockFp8(normal(seed + 1, outputs, inputs).mul(20).to(FP8), scales)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_dequantize_multiplies_each_value_by_its_blocks_scale(outputs: int, inputs: int) -> None:
    weight = random_blocks(1, outputs, inputs)
    result = dequantize(weight, torch.float64)
    for row in {0, outputs // 2, outputs - 1}:
        for column in {0, inputs // 3, inputs - 1}:
            scale = weight.scales[row // 128, column // 128]
            assert result[row, column] == (weight.values_OI[row, column].float() * scale).double()
    assert dequantize(weight, torch.bfloat16).equal(result.float().bfloat16())


def test_stacked_matrices_are_dequantised_alike() -> None:
    matrices = [random_blocks(seed, 130, 200) for seed in range(3)]
    stacked, _ = stack_experts(zip(matrices, matrices, strict=True), 3)
    assert isinstance(stacked, BlockFp8)
    assert stacked.values_OI.shape == (3, 130, 200)
    expected = torch.stack([dequantize(matrix, torch.float32) for matrix in matrices])
    assert dequantize(stacked, torch.float32).equal(expected)
    none = BlockFp8(torch.empty(0, 130, 200, dtype=FP8), torch.empty(0, 2, 2))
    assert dequantize(none, torch.float32).shape == (0, 130, 200)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_quantize_uses_the_whole_range_of_each_block(outputs: int, inputs: int) -> None:
    weight_OI = normal(3, outputs, inputs) * torch.linspace(0.01, 100, inputs)
    weight_OI[:, -1] = 1e-3
    weight = quantize(weight_OI)
    assert weight.scales.shape == (num_blocks(outputs), num_blocks(inputs))
    for row in range(0, outputs, 128):
        for column in range(0, inputs, 128):
            block = weight_OI[row : row + 128, column : column + 128]
            stored = weight.values_OI[row : row + 128, column : column + 128].float()
            assert stored.abs().max() == 448
            error = stored * weight.scales[row // 128, column // 128] - block
            # Half a step of 2^-3, or of the smallest numbers' fixed step.
            least = 2.0**-10 * weight.scales[row // 128, column // 128]
            assert bool((error.abs() <= block.abs() * 2**-4 + least).all())


@pytest.mark.parametrize("shape", [(0, 256), (1, 128), (5, 300), (2, 3, 200)])
def test_rows_have_a_scale_for_each_128_columns(shape: tuple[int, ...]) -> None:
    x = normal(4, *shape)
    values, scales = quantize_rows(x)
    assert values.dtype == FP8
    assert values.shape == x.shape
    assert scales.shape == (*shape[:-1], num_blocks(shape[-1]))
    restored = dequantize_rows(values, scales, torch.float32)
    assert bool(((restored - x).abs() <= x.abs() * 2**-4 + 1e-4).all())
    if x.numel():
        matrix = quantize(x.reshape(-1, shape[-1])[:1])  # one row is a matrix of one row
        assert matrix.scales.flatten().equal(scales.reshape(-1, scales.shape[-1])[0])


def test_zeros_stay_zeros() -> None:
    assert dequantize(quantize(torch.zeros(200, 200)), torch.float32).equal(torch.zeros(200, 200))
    assert dequantize_rows(*quantize_rows(torch.zeros(2, 130)), torch.float32).count_nonzero() == 0


def test_linear_is_the_dequantised_matrix_in_float32() -> None:
    weight, x_TI, bias_O = random_blocks(5, 130, 200), normal(6, 7, 200), normal(7, 130)
    expected = x_TI.double() @ dequantize(weight, torch.float64).T + bias_O.double()
    result = linear(weight, bias_O)(x_TI)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-3)
    assert linear(weight, None)(x_TI.bfloat16()).dtype == torch.bfloat16


# --- which form ----------------------------------------------------------------------------------


@dataclass
class Reader:
    """Says how it was asked."""

    asked: list[tuple[str, Shard | None]] = field(default_factory=list)

    def take(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None, dtype: object = None
    ) -> Tensor:
        self.asked.append(("plain", shard))
        return torch.zeros(shard.local_shape(shape) if shard else shape)

    def take_blocks(
        self, name: str, shape: tuple[int, ...], shard: Shard | None = None
    ) -> BlockFp8:
        self.asked.append(("blocks", shard))
        return quantize(torch.zeros(shard.local_shape(shape) if shard else shape))

    def has(self, name: str) -> bool:
        return True

    def scope(self, prefix: str) -> "Reader":
        return self


@pytest.mark.parametrize(
    ("shape", "shard", "form"),
    [
        ((576, 200), None, "blocks"),
        ((512, 200), Shard(0, 1, 2), "blocks"),
        ((576, 200), Shard(0, 0, 2), "plain"),
        ((576, 200), Shard(0, 1, 2), "plain"),
        ((200, 2048), Shard(1, 3, 16), "blocks"),
        ((200, 2048), Shard(1, 3, 32), "plain"),
    ],
)
def test_a_part_of_whole_blocks_stays_in_blocks(
    shape: tuple[int, int], shard: Shard | None, form: str
) -> None:
    reader = Reader()
    part = BlockFp8Format(torch.bfloat16).take(reader, "w", shape, shard)
    assert reader.asked == [(form, shard)]
    assert isinstance(part, BlockFp8) == (form == "blocks")


def test_joining_keeps_blocks_that_begin_where_others_end() -> None:
    form = BlockFp8Format(torch.bfloat16)
    first, last = random_blocks(1, 256, 200), random_blocks(2, 64, 200)
    joined = form.join([first, last])
    assert isinstance(joined, BlockFp8)
    expected = torch.cat([dequantize(part, torch.float32) for part in (first, last)])
    assert dequantize(joined, torch.float32).equal(expected)
    turned = form.join([last, first])
    assert isinstance(turned, Tensor)
    assert turned.equal(torch.cat([dequantize(p, torch.bfloat16) for p in (last, first)]))
    mixed = form.join([first, normal(3, 4, 200).bfloat16()])
    assert isinstance(mixed, Tensor)
    assert mixed.shape == (260, 200)
    assert form.join([first]) is first


@pytest.mark.parametrize(
    ("device", "quantization", "capability", "blocks"),
    [
        (GPU, BLOCKS, (9, 0), True),
        (GPU, BLOCKS, None, True),  # no GPU here: a plan for other machines
        (GPU, BLOCKS, (8, 0), False),
        (GPU, None, (9, 0), False),
        (GPU, BlockQuantization(64, 64), (9, 0), False),
        (CPU, BLOCKS, (9, 0), False),
    ],
)
def test_select_format(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    quantization: BlockQuantization | None,
    capability: tuple[int, int] | None,
    blocks: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    form = select_format(device, quantization)
    assert type(form) is (BlockFp8Format if blocks else PlainFormat)
