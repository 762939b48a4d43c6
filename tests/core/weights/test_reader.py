"""What a rank takes from a checkpoint, and the errors when the two don't match."""

import math
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from core.errors import ModelError
from core.interfaces.weights import Shard, TensorInfo
from core.weights.manifest import TensorRequest
from core.weights.reader import CheckpointReader, ShapeReader
from tests.support.models import CPU, ignore_progress


class MemorySource:
    """A checkpoint that is a dict."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.read_values = 0

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(tuple(tensor.shape), tensor.dtype, "weights.bin")
            for name, tensor in self._tensors.items()
        }

    def stream(
        self, name: str, dim: int, start: int, stop: int, staging: Tensor
    ) -> Iterator[Tensor]:
        tensor = self._tensors[name]
        if tensor.dim() == 0:
            tensor = tensor.view(1)
        part = tensor.narrow(dim, start, stop - start)
        self.read_values += part.numel()
        if part.numel() > 0:
            yield from part.reshape(math.prod(part.shape[: max(dim, 1)]), -1).split(3)


MATRIX = torch.arange(40.0).view(10, 4)


def reader_of(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> CheckpointReader:
    return CheckpointReader(MemorySource(tensors), dtype, CPU, ignore_progress)


def test_parts_are_the_whole_and_no_more_is_read() -> None:
    for shard_dim, count in ((0, 5), (1, 2)):
        parts = []
        for index in range(count):
            source = MemorySource({"w": MATRIX})
            reader = CheckpointReader(source, torch.float32, CPU, ignore_progress)
            parts.append(reader.take("w", (10, 4), Shard(shard_dim, index, count)))
            assert source.read_values == 40 // count
        assert torch.equal(torch.cat(parts, shard_dim), MATRIX)


def test_padded_parts_end_in_zeros() -> None:
    for dim, count, padding in ((0, 4, 2), (0, 7, 4), (1, 3, 2)):
        parts = [
            reader_of({"w": MATRIX}).take("w", (10, 4), Shard(dim, index, count, padded=True))
            for index in range(count)
        ]
        whole = torch.cat(parts, dim)
        assert torch.equal(whole.narrow(dim, 0, MATRIX.shape[dim]), MATRIX)
        rest = whole.narrow(dim, MATRIX.shape[dim], padding)
        assert rest.numel() > 0
        assert rest.abs().sum() == 0


def test_dtype_is_the_models() -> None:
    reader = reader_of({"w": MATRIX}, torch.bfloat16)
    assert reader.take("w", (10, 4), Shard(0, 0, 2)).dtype == torch.bfloat16


def test_scopes_nest() -> None:
    reader = reader_of({"model.layers.0.w": MATRIX})
    layer = reader.scope("model").scope("layers.0")
    assert layer.has("w")
    assert not layer.has("v")
    assert torch.equal(layer.take("w", (10, 4)), MATRIX)


def test_missing_tensors_are_named_with_the_closest_there_is() -> None:
    with pytest.raises(ModelError) as error:
        reader_of({"model.norm.weight": MATRIX}).take("model.norms.weight", (10, 4))
    for words in (
        "model.norms.weight of shape 10x4 is missing",
        "weights.bin",
        "model.norm.weight",
    ):
        assert words in str(error.value)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ModelError, match=r"tensor w in weights\.bin has shape 10x4.*needs 4x10"):
        reader_of({"w": MATRIX}).take("w", (4, 10))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e5m2])
def test_quantised_tensors_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=f"tensor w in .* has dtype {dtype}.*bfloat16"):
        reader_of({"w": torch.zeros(2, 2).to(dtype)}).take("w", (2, 2))


def test_surplus_is_an_error_but_known_leftovers_are_not() -> None:
    known = {"lm_head.weight": MATRIX, "model.layers.0.self_attn.rotary_emb.inv_freq": MATRIX}
    reader = reader_of({"w": MATRIX} | known)
    reader.take("w", (10, 4))
    reader.finish()
    reader = reader_of({"w": MATRIX, "x": MATRIX, "y": MATRIX} | known)
    reader.take("w", (10, 4))
    assert reader.surplus() == ["x", "y"]
    with pytest.raises(ModelError, match=r"2 tensors .*: x \(in weights\.bin\), y \(in"):
        reader.finish()


def test_progress_ends_at_the_total() -> None:
    seen: list[tuple[str, int, int, str]] = []
    source = MemorySource({"a": MATRIX, "b": MATRIX})
    reader = CheckpointReader(source, torch.float32, CPU, lambda *report: seen.append(report))
    reader.take("a", (10, 4), Shard(0, 0, 2))
    reader.take("b", (10, 4))
    reader.finish()
    assert seen[-1] == ("load weights", 320, 320, "B")


def test_progress_counts_this_ranks_part_where_it_is_known() -> None:
    seen: list[tuple[str, int, int, str]] = []
    expected = [TensorRequest("a", (10, 4), Shard(0, 0, 2), torch.float32)]
    reader = CheckpointReader(
        MemorySource({"a": MATRIX}),
        torch.float32,
        CPU,
        lambda *report: seen.append(report),
        expected=expected,
    )
    reader.take("a", (10, 4), Shard(0, 0, 2))
    reader.finish()
    assert seen[-1] == ("load weights", 80, 80, "B")


def test_shapes_alone_count_bytes() -> None:
    reader = ShapeReader(torch.bfloat16)
    part = reader.scope("model").take("w", (10, 4), Shard(0, 1, 2))
    assert (part.device.type, part.shape, part.dtype) == ("meta", (5, 4), torch.bfloat16)
    assert (reader.num_bytes, reader.num_logical_parameters) == (40, 40)
    assert reader.pieces == {("model.w", 0, 1): 20}
    reader.scope("model").take("w", (10, 4), Shard(0, 0, 2))
    assert (reader.num_bytes, reader.num_logical_parameters) == (80, 40)
