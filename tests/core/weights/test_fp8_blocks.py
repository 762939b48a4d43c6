"""Matrices stored as fp8 blocks: dequantised as plain torch does it in float64, or as they are."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from core.errors import ModelError
from core.interfaces.model import BlockQuantization
from core.interfaces.weights import Shard
from core.weights import load
from core.weights.reader import CheckpointReader, ShapeReader
from plugins.checkpoints._dummy_reader import DummyReader
from plugins.checkpoints._safetensors.source import SafetensorsSource
from tests.support.models import CPU, ignore_progress

SHAPE = (300, 520)  # the last blocks are smaller, in both dimensions
FP8 = torch.float8_e4m3fn


def stored_blocks(shape: tuple[int, int] = SHAPE, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 50  # torch 2.11 makes NaN of more than 464
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=generator) * 1e-3
    return values.to(FP8), scales


def exact(values: Tensor, scales: Tensor, block: int = 128) -> Tensor:
    """In float64, where a product of 4 and 24 bits is exact."""
    whole = scales.double().repeat_interleave(block, 0).repeat_interleave(block, 1)
    return values.double() * whole[: values.shape[0], : values.shape[1]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values, scales = stored_blocks()
    path = tmp_path_factory.mktemp("fp8") / "model.safetensors"
    save_file({"a.weight": values, "a.weight_scale_inv": scales}, path)
    return path


def open_reader(path: Path, dtype: torch.dtype = torch.float32) -> CheckpointReader:
    return CheckpointReader(SafetensorsSource([str(path)]), dtype, CPU, ignore_progress)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_matrices_are_the_exact_products_rounded(path: Path, dtype: torch.dtype) -> None:
    reader = open_reader(path, dtype)
    found = reader.take("a.weight", SHAPE)
    assert torch.equal(found, exact(*stored_blocks()).float().to(dtype))
    reader.finish()  # the scales are no surplus


def test_every_value_there_is(tmp_path: Path) -> None:
    """Zeros, denormals, the largest, both signs; and NaN stays what it is."""
    scales = torch.tensor([[2.0**-130, 3.3e38, 0.7, -1.1e-5]])  # the products too may be denormal
    bits = torch.arange(256, dtype=torch.uint8).repeat(512, 2)
    for nan in (False, True):
        kept = bits if nan else torch.where(bits & 127 == 127, 0, bits)
        values = kept.T.contiguous().view(FP8)
        all_scales = scales.expand(4, 4).contiguous()
        save_file({"w": values, "w_scale_inv": all_scales}, tmp_path / "x.safetensors")
        found = open_reader(tmp_path / "x.safetensors").take("w", (512, 512))
        expected = exact(values, all_scales).float()
        assert torch.equal(found.isnan(), expected.isnan())
        assert found.isnan().any() == nan
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(0, 1), count=st.integers(1, 40), part=st.integers(0, 39), padded=st.booleans()
)
def test_every_part_is_that_of_the_whole(
    path: Path, dim: int, count: int, part: int, padded: bool
) -> None:
    """Also where it begins or ends inside a block, and in whatever pieces it is read."""
    if SHAPE[dim] % count != 0 and not padded:
        padded = True
    shard = Shard(dim, part % count, count, padded)
    found = open_reader(path).take("a.weight", SHAPE, shard)
    start, stop = shard.bounds(SHAPE[dim])
    expected = torch.zeros(shard.local_shape(SHAPE), dtype=torch.float64)
    expected.narrow(dim, 0, stop - start).copy_(
        exact(*stored_blocks()).narrow(dim, start, stop - start)
    )
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("staging_bytes", [1, 1000, 7 * 520])
def test_small_buffers_change_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, staging_bytes: int
) -> None:
    monkeypatch.setattr(load, "STAGING_BYTES", staging_bytes)
    expected = exact(*stored_blocks()).float()
    for shard in (None, Shard(0, 2, 3), Shard(1, 1, 8)):
        found = open_reader(path).take("a.weight", SHAPE, shard)
        wanted = expected.chunk(shard.count, shard.dim)[shard.index] if shard else expected
        assert torch.equal(found, wanted)


def test_other_block_sizes_are_those_of_the_config(tmp_path: Path) -> None:
    values = stored_blocks()[0]
    scales = torch.rand(-(-SHAPE[0] // 64), -(-SHAPE[1] // 64))
    save_file({"w": values, "w_scale_inv": scales}, tmp_path / "x.safetensors")
    source = SafetensorsSource([str(tmp_path / "x.safetensors")])
    block = BlockQuantization(64, 64)
    reader = CheckpointReader(source, torch.float32, CPU, ignore_progress, block=block)
    assert torch.equal(reader.take("w", SHAPE), exact(values, scales, 64).float())


def test_blocks_as_they_are(tmp_path: Path) -> None:
    values, scales = stored_blocks((512, 640))
    save_file({"w": values, "w_scale_inv": scales}, tmp_path / "x.safetensors")
    for shard, rows, columns in (
        (None, slice(None), slice(None)),
        (Shard(0, 1, 4), slice(1, 2), slice(None)),
        (Shard(1, 2, 5), slice(None), slice(2, 3)),
    ):
        part = open_reader(tmp_path / "x.safetensors").take_blocks("w", (512, 640), shard)
        expected = exact(values, scales).unflatten(0, (4, 128)).unflatten(2, (5, 128))
        found = exact(part.values_OI, part.scales)
        assert torch.equal(part.scales, scales[rows, columns])
        assert torch.equal(found, expected[rows, :, columns].flatten(2).flatten(0, 1))
        assert part.values_OI.dtype == FP8


def test_cutting_a_block_in_two_is_refused_with_what_to_do(path: Path) -> None:
    for reader in (open_reader(path), ShapeReader(torch.bfloat16)):
        for shard in (Shard(0, 0, 3), Shard(1, 1, 2)):
            with pytest.raises(ModelError, match=r"a\.weight of shape 300x520 inside its blocks"):
                reader.take_blocks("a.weight", SHAPE, shard)


def test_matrices_without_scales_or_with_others_are_named(tmp_path: Path) -> None:
    values, scales = stored_blocks()
    path = tmp_path / "x.safetensors"
    for companion, words in (
        ({}, r"w_scale_inv of shape 3x5 is missing"),
        ({"w_scale_inv": scales[:2].clone()}, r"w_scale_inv in .* has shape 2x5 .*needed: 3x5"),
        (
            {"w_scale_inv": scales.double()},
            r"dtype torch\.float64; needed: 3x5, one .* in float32, bfloat16, float16",
        ),
    ):
        save_file({"w": values} | companion, path)
        with pytest.raises(ModelError, match=words):
            open_reader(path).take("w", SHAPE)
    save_file({"w": values.bfloat16()}, path)
    with pytest.raises(ModelError, match=r"dtype torch\.bfloat16, but config\.json says"):
        open_reader(path).take_blocks("w", SHAPE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_scales_of_other_dtypes_are_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    """Qwen's own checkpoints store them in bfloat16."""
    values, scales = stored_blocks((512, 640))
    narrow = scales.to(dtype)
    save_file({"w": values, "w_scale_inv": narrow}, tmp_path / "x.safetensors")
    found = open_reader(tmp_path / "x.safetensors").take("w", (512, 640))
    assert torch.equal(found, exact(values, narrow.float()).float())
    part = open_reader(tmp_path / "x.safetensors").take_blocks("w", (512, 640), Shard(1, 1, 5))
    assert part.scales.dtype == torch.float32
    assert torch.equal(part.scales, narrow.float()[:, 1:2])


def test_shapes_count_a_byte_for_each_value_and_the_scales() -> None:
    shapes = ShapeReader(torch.bfloat16)
    part = shapes.scope("a").take_blocks("w", (512, 520), Shard(0, 1, 2))
    assert (part.values_OI.shape, part.scales.shape) == ((256, 520), (2, 5))
    assert part.values_OI.is_meta
    assert shapes.num_bytes == 256 * 520 + 4 * 2 * 5
    shapes.take("b", (10,), None, torch.float32)
    assert shapes.num_bytes == 256 * 520 + 4 * 2 * 5 + 40
    assert shapes.num_logical_parameters == 512 * 520 + 10
    assert shapes.pieces == {("a.w", 0, 1): 256 * 520, ("b", 0, 0): 10}


def test_dummy_blocks_are_like_dummy_weights() -> None:
    def reader() -> DummyReader:
        return DummyReader(0, torch.bfloat16, CPU, ignore_progress)

    whole = reader().take_blocks("w", SHAPE)
    values = exact(whole.values_OI, whole.scales)
    plain = reader().take("w", SHAPE).double()
    assert whole.scales.shape == (3, 5)
    assert values.isfinite().all()
    assert (values - plain).abs().max() < 0.07 * 0.12  # 3 bits of mantissa at the largest values
    assert torch.corrcoef(torch.stack((values.flatten(), plain.flatten())))[0, 1] > 0.998
    parts = [reader().take_blocks("x", (256, 256), Shard(1, i, 2)).values_OI for i in range(2)]
    joined = torch.cat([part.view(torch.uint8) for part in parts], 1)
    assert torch.equal(joined, reader().take_blocks("x", (256, 256)).values_OI.view(torch.uint8))
