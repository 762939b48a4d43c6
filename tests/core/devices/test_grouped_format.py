"""Which matrices of a checkpoint stay in 4- and 8-bit groups, and what joining them gives."""

import dataclasses

import pytest
import torch

from core.devices.weight_formats import select_format
from core.interfaces.weights import GroupedInts
from core.ops.grouped_ints import dequantize
from core.parallel.sharding import Shard
from core.weights.reader import ShapeReader
from tests.core.devices.cpu.test_cpu_grouped_ints import made_up

CPU = torch.device("cpu")
BITS = {"q": 4, "k": 4, "head": 8}


@pytest.mark.parametrize(
    ("name", "shape", "shard", "kept"),
    [
        ("q", (64, 96), None, (64, 96)),
        ("head", (64, 96), None, (64, 96)),
        ("q", (64, 96), Shard(0, 1, 2), (32, 96)),
        ("q", (64, 192), Shard(1, 1, 3), (64, 64)),
        ("other", (64, 96), None, None),  # not stored in groups
        ("q", (64, 96), Shard(1, 0, 2), None),  # 48 columns are no whole groups
        ("q", (64, 96), Shard(0, 0, 8), None),  # 8 outputs are fewer than the kernel takes
        ("head", (100, 96), Shard(0, 1, 3, padded=True), None),  # zeros past the end
        ("q", (64, 48), None, None),
    ],
)
def test_whole_groups_stay(
    name: str, shape: tuple[int, int], shard: Shard | None, kept: tuple[int, int] | None
) -> None:
    form = select_format(CPU, None, torch.float32, keep_groups=True)
    reader = ShapeReader(torch.float32, group_bits=BITS)
    weight = form.take(reader, name, shape, shard)
    assert form.keeps_groups(reader, name, shape, shard) == (kept is not None)
    if kept is None:
        assert isinstance(weight, torch.Tensor)
        return
    assert isinstance(weight, GroupedInts)
    assert weight.values_OI.shape == kept
    assert weight.bits == BITS[name]
    # What a kernel keeps: 16 bits of scale and 16 of minimum for 32 numbers of 4 bits.
    assert reader.num_bytes == kept[0] * kept[1] * weight.bits // 4 * 5 // 8


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)],
)
def test_groups_may_be_held_in_16_bits_besides(dtype: torch.dtype, wide: torch.dtype) -> None:
    form = select_format(CPU, None, dtype, keep_groups=True, widen_groups=True)
    reader = ShapeReader(dtype, group_bits=BITS, widened=True)
    weight = form.take(reader, "q", (64, 96))
    assert isinstance(weight, GroupedInts)
    assert weight.wide is wide
    assert reader.num_bytes == 64 * 96 * 5 // 8 + 64 * 96 * 2
    joined = form.join([dataclasses.replace(made_up(4, 32, 64), wide=wide)] * 2)
    assert isinstance(joined, GroupedInts)
    assert joined.wide is wide


def test_joined_groups_stay_groups() -> None:
    form = select_format(CPU, None, torch.float32, keep_groups=True)
    parts = [made_up(4, 32, 64, seed=1), made_up(4, 16, 64, seed=2)]
    joined = form.join(parts)
    assert isinstance(joined, GroupedInts)
    expected = torch.cat([dequantize(part, torch.float32) for part in parts])
    assert torch.equal(dequantize(joined, torch.float32), expected)


@pytest.mark.parametrize("other", [made_up(8, 16, 64), torch.ones(16, 64)])
def test_groups_and_others_become_a_matrix(other: GroupedInts | torch.Tensor) -> None:
    form = select_format(CPU, None, torch.float32, keep_groups=True)
    joined = form.join([made_up(4, 32, 64), other])
    assert isinstance(joined, torch.Tensor)
    plain = other if isinstance(other, torch.Tensor) else dequantize(other, torch.float32)
    assert torch.equal(joined[32:], plain)
    assert torch.equal(joined[:32], dequantize(made_up(4, 32, 64), torch.float32))
